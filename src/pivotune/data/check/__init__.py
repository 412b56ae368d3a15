"""Data check: finds defects of parallel instruction data and states how sure each finding is.

Three kinds of evidence: a row alone (damaged text, copied from English, wrong language, repeated), a row against all
others (cut answers, length ratio, a small word lexicon learned from the file itself), and neighbouring rows (an English
side that has slipped).
Every threshold is a constant with its reason, in the module that uses it. They were set on Alpaca in Vietnamese and
Chinese, by reading flagged rows and by planting defects; a flag on one row is a reason to look at it, not a proof.
"""

from pivotune.data.check.clean import check_clean_path, report_path, row_record, write_clean
from pivotune.data.check.result import DataCheck
from pivotune.data.check.run import check_rows

__all__ = ["DataCheck", "check_clean_path", "check_rows", "report_path", "row_record", "write_clean"]
