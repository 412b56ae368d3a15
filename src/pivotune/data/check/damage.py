"""Text damage that one row shows: markup, control tokens, placeholders, escapes, repetitions, spacing, English left over.

A row is compared with its other side: markup that both sides have is what the row is about.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from pivotune.data.check.characters import (
    SEARCHED_CHARACTERS,
    compatibility_characters,
    decomposed_characters,
    invisible_characters,
    wrong_encoding,
)
from pivotune.data.check.language import ENGLISH_WORDS, LINK, Text
from pivotune.data.check.shifts import NUMBER
from pivotune.data.rows import Row
from pivotune.data.templates import Turn
from pivotune.text.words import is_unspaced

_TAG_NAMES = (
    "a|article|b|bdo|big|blockquote|body|br|button|center|cite|code|dd|del|div|dl|dt|em|font|footer|form|g|h[1-6]|head|header|"
    "hr|html|i|iframe|img|input|ins|kbd|label|li|link|mark|meta|nav|ol|option|p|ph|pre|q|script|section|select|small|span|"
    "strike|strong|style|sub|sup|svg|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|ul|video|x"
)
_TAG = re.compile(
    rf"[<＜]\s?(?:/\s?)?(?:{_TAG_NAMES})(?:\s+[\w:-]+\s?=\s?[^<>＜＞]{{0,200}})?\s?/?\s?[>＞]|<!--|<!DOCTYPE|<!\[CDATA\[",
    re.I,
)
# Translators put spaces into escapes.
_ESCAPE = re.compile(r"&\s?(?:[A-Za-z]{2,8}\d{0,2}|[#＃]\s?\d{2,6}|[#＃]x[0-9A-Fa-f]{2,6})\s?[;；]")
# A row about markup may show it; so may an answer in a programming language. Whole words: a manuscript is no script.
_ABOUT_MARKUP = re.compile(
    r"html|\bxml|\bcss\b|\bweb ?pages?\b|\btags?\b|\bscripts?\b|\bcod(?:e|ing)\b|\bprogramming\b|\bencod|\burls?\b|"
    r"\bescap(?:e|ed|ing) (?:char|seq|code|quot|str)|\bentity (?:name|reference)|latex|\bregex|markdown|javascript|python|"
    r"json|unicode|\btokens?\b|special character",
    re.I,
)
# Names of the control tokens of the common families, and the ways in which subword tokenizers mark their pieces.
_CONTROL_TOKEN = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</?s>|<(?:bos|eos|pad|unk|sep|cls|(?:start|end)_of_(?:turn|text|image)|extra_id_\d+)>"
    r"|\[/?INST\]|<</?SYS>>|\[(?:PAD|CLS|SEP|UNK|BOS|EOS)\]|<0x[0-9A-F]{2}>|<unused\d+>|<\|?endoftext\|?>"
)
_SUBWORD = re.compile(r"(?:^|\s)▁\w|[ĠĊ](?:\w|$)|\w@@ |(?<!\S)##[^\W\d_]{1,4}(?!\S)")
_NO_INPUT = re.compile(r"[<＜〈\[(]\s?no[\s_-]?(?:in|out)put\s?[>＞〉\])]", re.I)
# Whole texts, or the last line of a prompt, that programs write where they have nothing to write.
_EMPTY_VALUES = frozenset(
    ("noinput", "nooutput", "nan", "none", "null", "nil", "undefined", "n/a", "na", "#n/a", "#na", "#ref!", "#value!",
     "#name?", "#div/0!", "#null!", "\\n", "nat", "[objectobject]")
)  # fmt: skip
_OBJECT = re.compile(
    r"\[object \w+\]|#(?:REF!|VALUE!|NAME\?|DIV/0!)|\{\{\s?\w*\s?\}\}|__?(?:PH|VAR|TAG|NUM)_?\d+__?|⟨\d+⟩"
)
_LAST_VALUE = re.compile(r"(?:^|[\n:：])\s*([^\n:：]{2,20})\s*$")
# Messages of translation services in place of a translation, and phrases around one.
_SERVICE = re.compile(
    r"MYMEMORY WARNING|QUERY LENGTH LIMIT|too many requests|quota exceeded|translation (?:failed|error|not available)|"
    r"^(?:error|http)\W{0,3}\d{3}\b|^(?:sure[,!]? )?here(?: is|'s|’s) (?:the|your|a) (?:\w+ )?translation|"
    r"^translat(?:ion|ed text)\s?:",
    re.I,
)
_LITERAL = re.compile(r"\\[nrt](?![a-z]*\{)|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[\"']|_x000[ADad]_")
_PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2}){2,}")
_DOUBLED_QUOTE = re.compile(r'(?<!")""(?=[^\W_])|(?<=[^\W_])""(?!")')
_WRAPPED = re.compile(r"^\s*(?:\{\s*[\"'][\w -]{1,30}[\"']\s*:|\[\s*[\"']|b[\"'])")
# A text, or a sentence, of so many characters does not stand twice in a row by intention. Verses end without a full stop.
REPEAT_CHARACTERS = 12
_SENTENCE = re.compile(r"[^.!?…。！？؟۔।॥။\n]{1,400}(?:[.!?…]+(?=\s|$)|[。！？؟۔।॥။]+)")
# A text that ends with so many characters of repetitions, of at least so many copies.
LOOP_CHARACTERS, LOOP_TIMES = 80, 4
# Before `!` and `?` French writes one.
_SPACE_BEFORE_SIGN = re.compile(r"(?<=\w) [.,](?=[\s\"”’)]|$)")
_SIGN = re.compile(r"[.,](?=[\s\"”’)]|$)")
_SPACED_LETTERS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff] (?=[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff])")
# An English answer with so many line breaks is a list, verses or paragraphs.
LOST_LINES = 3
_LETTERS_WITHOUT_SPACE = re.compile(r"[^\W\d_]{40,}")
# English words in a row that are left over in a translation: so many, or most of the answer's letters, or a sentence of
# `LEFT_SENTENCE` words. Shorter ones are titles and quotes. Some must be among the commonest words.
LEFT_WORDS, LEFT_SHARE, LEFT_COMMON, LEFT_SENTENCE = 12, 0.6, 2, 6
_ASKS_FOR_ENGLISH = re.compile(
    r"english|translat|(?<!job )\btitle|cipher|decrypt|decod|spell|grammar|capitali[sz]|punctuat|google search", re.I
)
# Between the parts of one number: 1万2345.
_MYRIAD = re.compile(r"(?<=\d)[万萬亿億만억]\s?(?=\d)")
_PROGRAM = re.compile(r"\w\([\w ]*[,)=]|[=!]=|\bSELECT\b|^\s*(?:def|for|if|while|import|return)\b.*[:;]$", re.M)


def html_tags(text: Text, other: Text) -> str:
    """Find HTML tags that the other side does not have."""
    found = _TAG.findall(text.text) if "<" in text.text or "＜" in text.text else []
    if not found or "<!" in other.text or other.is_code() or _TAG.search(other.text):
        return ""
    # A row about web pages may name a tag that the translation has put into words.
    return "" if len(found) == 1 and _about_markup(other) else " ".join(dict.fromkeys(found[:5]))


def html_escapes(text: Text, other: Text) -> str:
    """Find HTML escapes, on both sides too unless the row is about markup or code."""
    if "&" not in text.text:
        return ""
    found = [match for match in _ESCAPE.findall(text.text) if html.unescape(_squeezed(match)) != _squeezed(match)]
    if not found or (_ESCAPE.search(other.text) and _about_markup(text, other)):
        return ""
    return " ".join(dict.fromkeys(found[:5]))


def _squeezed(escape: str) -> str:
    return "".join(escape.split()).replace("；", ";").replace("＃", "#")


def _about_markup(*texts: Text) -> bool:
    # Escapes count as the signs that they stand for: many of them make no code.
    return any(_ABOUT_MARKUP.search(text.text) or Text(html.unescape(text.text)).is_code() for text in texts)


def control_tokens(text: Text, other: Text) -> str:
    """Find names of control tokens, and marks of subword tokenizers, which are no words of any language."""
    found = _CONTROL_TOKEN.findall(text.text) if "<" in text.text or "[" in text.text else []
    is_code = other.is_code() or text.is_code()
    found = [token for token in found if "|" in token or not (is_code and _CONTROL_TOKEN.search(other.text))]
    if not found and any(map(text.text.__contains__, ("▁", "Ġ", "@@", "##"))):
        pieces = _SUBWORD.findall(text.text)
        found = pieces if (len(pieces) >= 2 or "▁" in "".join(pieces)) and not _SUBWORD.search(other.text) else []
    return " ".join(dict.fromkeys(found[:5]))


def literal_escapes(text: Text, other: Text) -> str:
    r"""Find escapes of programs that were never undone: `\n`, `\u1ea1`, `%C3%A9`, `""`, and the program's text around."""
    found = _LITERAL.findall(text.text) if "\\" in text.text or "_x" in text.text else []
    lines = "\\n" in found and "\n" not in text.text and "\n" in other.text
    if found and (lines or not _about_markup(other)) and (len(found) >= 2 or not _LITERAL.search(other.text)):
        return " ".join(dict.fromkeys(found[:5]))
    if "%" in text.text and not _PERCENT.search(other.text):
        links = [word for word in text.text.split() if _PERCENT.search(word)]
        if any("/" not in word and "=" not in word for word in links):
            return links[0][:40]
    if '""' in text.text and '""' not in other.text and _DOUBLED_QUOTE.search(text.text) and not text.is_code():
        return '""'
    return ""


def repeated_text(text: Text, other: Text) -> str:
    """Find a text written twice, a loop at its end, or a sentence twice in a row, where the other side has none."""
    for find in (_repeated_whole, _loop, _repeated_sentence):
        if (found := find(text.text)) and not find(other.text) and not text.is_code():
            return f"again: {found[:40]}"
    return ""


def _repeated_whole(text: str) -> str:
    """Return the part of which the text is a whole number of copies, spaces aside."""
    squeezed = "".join(text[:SEARCHED_CHARACTERS].split())
    period = (squeezed + squeezed).find(squeezed, 1)
    return squeezed[:period] if REPEAT_CHARACTERS <= period < len(squeezed) else ""


def _loop(text: str) -> str:
    """Return what the end of a text repeats over and over: a model for translation that got stuck."""
    end = text.rstrip()[-LOOP_CHARACTERS:]
    for period in range(2, LOOP_CHARACTERS // LOOP_TIMES + 1):
        # The last copy may be cut, so that only whole copies before it count.
        if end[period:] == end[:-period] and len(end) == LOOP_CHARACTERS and any(map(str.isalpha, end)):
            return end[-period:]
    return ""


def _repeated_sentence(text: str) -> str:
    sentences = (match.strip() for match in _SENTENCE.findall(text[:SEARCHED_CHARACTERS]))
    return next((one for one, two in pairwise(sentences) if one == two and len(one) >= REPEAT_CHARACTERS), "")


def spacing(text: Text, other: Text) -> str:
    """Find lost or added spaces and lost line breaks."""
    sample = text.text[:SEARCHED_CHARACTERS]
    spaced = len(_SPACED_LETTERS.findall(sample))
    if spaced >= 8 and 3 * spaced >= sum(map(is_unspaced, sample)):
        return "spaces between the letters"
    before, signs = len(_SPACE_BEFORE_SIGN.findall(sample)), len(_SIGN.findall(sample))
    if before and before >= 0.6 * signs and not _SPACE_BEFORE_SIGN.search(other.text) and not text.is_code():
        return "spaces before the punctuation"
    run = _LETTERS_WITHOUT_SPACE.search(sample)
    if run and not is_unspaced(run.group()) and not _LETTERS_WITHOUT_SPACE.search(other.text) and not text.is_code():
        return f"no spaces: {run.group()[:40]}"
    return ""


# Each takes a text and its other side, and has the name of its kind of problem.
TEXT_DAMAGE = (
    html_tags, html_escapes, wrong_encoding, invisible_characters, decomposed_characters, compatibility_characters,
    control_tokens, literal_escapes, repeated_text, spacing,
)  # fmt: skip


def find_damage(target: Sequence[Text], english: Sequence[Text], row: Row) -> Iterator[tuple[str, str]]:
    """Yield (kind, note) for the damage of a row: `target` and `english` are prompt and answer of each side."""
    for side, texts, others in (("", target, english), ("English ", english, target)):
        for name, text, other in zip(("prompt", "answer"), texts, others, strict=True):
            for detect in TEXT_DAMAGE:
                if note := detect(text, other):
                    yield detect.__name__, f"{side}{name}: {note}"
    if not target[1].text.count("\n") and english[1].text.strip().count("\n") >= LOST_LINES:
        yield "spacing", "answer: no line breaks"
    own, others = row.sides
    if note := placeholder(own, others):
        yield "placeholder", note
    elif note := placeholder(others, own):
        yield "placeholder_in_english", note
    if note := left_in_english(target, english):
        yield "left_in_english", note


def placeholder(turn: Turn, other: Turn) -> str:
    """Find an empty value of a program (`nan`, `<noinput>`, `[object Object]`) or a service's message in place of text."""
    for text, counterpart in ((turn.user_text, other.user_text), (turn.completion, other.completion)):
        for pattern in (_NO_INPUT, _OBJECT, _SERVICE):
            if (match := pattern.search(text)) and (pattern is _NO_INPUT or not pattern.search(counterpart)):
                return match.group()
        if _is_empty_value(text) and (not _is_empty_value(counterpart) or text == turn.prompt):
            return text.strip()
    # An input is the field of its own, or the end of the prompt.
    last = turn.input or ((match := _LAST_VALUE.search(turn.prompt[-40:])) and match.group(1)) or ""
    return last.strip() if _is_empty_value(last) else ""


def _is_empty_value(text: str) -> bool:
    return len(text) <= 40 and "".join(text.lower().split()).strip("\"'`.。<>＜＞") in _EMPTY_VALUES


def left_in_english(target: Sequence[Text], english: Sequence[Text]) -> str:
    """Find an answer, or a part of it, that was left in English although the task does not ask for English text."""
    if ENGLISH_WORDS.isdisjoint(target[1].words):
        return ""
    if english[1].is_code() or _PROGRAM.search(english[1].text) or _ASKS_FOR_ENGLISH.search(english[0].text):
        return ""
    known, quoted = set(english[1].words), Counter(target[0].words)
    # A task that quotes English may be answered in English.
    if sum(quoted[word] for word in ENGLISH_WORDS) >= LEFT_COMMON and len(known.intersection(quoted)) > LEFT_COMMON:
        return ""
    own_text, english_text = (LINK.sub(" ", side[1].text) for side in (target, english))
    answer = Text(own_text).words
    longest: list[str] = []
    for is_known, run in groupby(answer, known.__contains__):
        words = list(run)
        if is_known and sum(word in ENGLISH_WORDS for word in words) >= LEFT_COMMON:
            longest = max(longest, words, key=len)
    # A Chinese character stands for about three letters.
    letters = sum(len(word) * (3 if is_unspaced(word) else 1) for word in answer)
    is_most = len(longest) >= LEFT_COMMON + 2 and sum(map(len, longest)) >= LEFT_SHARE * letters
    if len(longest) >= LEFT_WORDS or is_most:
        return f"the answer: {' '.join(longest)[:60]}"
    # A sentence of few common words ends as one; lists of names and titles do not.
    known_sentences = {tuple(Text(sentence).words) for sentence in _SENTENCE.findall(english_text)}
    for sentence in _SENTENCE.findall(own_text):
        words = Text(sentence).words
        if len(words) >= LEFT_SENTENCE and tuple(words) in known_sentences and not ENGLISH_WORDS.isdisjoint(words):
            return f"the answer: {' '.join(words)[:60]}"
    return ""


def lost_number(target: Sequence[Text], english: Sequence[Text]) -> str:
    """Find a number of the English side that the target side lacks.

    Separators, powers of ten (200,000 is 20万) and the script of the digits may differ. Numbers of one significant digit
    may be words, and decades (1950s) may be counted from the century.
    """
    for name, text, other in zip(("prompt", "answer"), target, english, strict=True):
        numbers = [match for match in NUMBER.finditer(other.text) if not other.text.startswith("s", match.end())]
        wanted = {digits: match.group() for match in numbers if len(digits := _significant(match.group())) > 1}
        if not wanted:
            continue
        found = NUMBER.findall(_MYRIAD.sub("", text.text))
        known, parts = set(map(_significant, found)), set(re.findall(r"\d+", " ".join(found)))
        for digits, number in wanted.items():
            # A list of numbers without spaces, or a time, may have other separators.
            if digits not in known and not parts.issuperset(re.findall(r"\d+", number)):
                return f"{name}: no {number}"
    return ""


def _significant(number: str) -> str:
    return "".join(str(int(digit)) for digit in number if digit.isdecimal()).strip("0")
