"""Translation of English instruction rows into parallel rows, by a local model or a chat endpoint."""
