"""Chat templates that write something before every answer: (template, words, spaces that share tokens with the answer)."""

from __future__ import annotations

LEADS = {
    "llama-2": ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
                "{% else %} {{ m.content }} <|end|>{% endif %}{% endfor %}", "", " "),
    "qwen3": ("{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
              "{% else %}<|assistant|><think>\n\n</think>\n\n{{ m.content }}<|end|>{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}<|assistant|>{% endif %}", "<think>\n\n</think>\n\n", ""),
}  # fmt: skip
