"""Codes of languages, and the codes in each set's file names."""

from __future__ import annotations

import re

import pytest

from pivotune.errors import UsageError
from pivotune.text.languages import find_language, flores_languages


@pytest.mark.parametrize(
    ("code", "flores", "name", "tatoeba", "ntrex"),
    [
        ("vi", "vie_Latn", "Vietnamese", "vie", "vie"),
        ("zh", "zho_Hans", "Chinese", "cmn", "zho-CN"),
        ("ar", "arb_Arab", "Arabic", "ara", "arb"),
        ("de", "deu_Latn", "German", "deu", "deu"),
        ("ru", "rus_Cyrl", "Russian", "rus", "rus"),
        ("es", "spa_Latn", "Spanish", "spa", "spa"),
        ("sw", "swh_Latn", "Swahili", "swh", "swa"),
        ("fa", "pes_Arab", "Persian", "pes", "fas"),
        ("ms", "zsm_Latn", "Malay", "zsm", "msa"),
        ("lv", "lvs_Latn", "Latvian", "lvs", "lav"),
        ("et", "est_Latn", "Estonian", "est", "est"),
        ("tl", "tgl_Latn", "Tagalog", "tgl", "fil"),
        ("no", "nob_Latn", "Norwegian", "nob", "nob"),
        ("sr", "srp_Cyrl", "Serbian", "srp", "srp-Cyrl"),
        ("az", "azj_Latn", "Azerbaijani", "aze", "aze-Latn"),
        ("pt", "por_Latn", "Portuguese", "por", "por-BR"),
        ("br", "bre_Latn", "Breton", "bre", "bre"),
        ("dv", "div_Thaa", "Divehi", "div", "div"),
    ],
)
def test_every_sets_code_of_a_language(code, flores, name, tatoeba, ntrex):
    language = find_language(code)
    assert (language.flores, language.name) == (flores, name)
    assert tatoeba in language.iso639_3
    assert ntrex in language.ntrex


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("VI", "vi"), (" vi ", "vi"), ("vie", "vi"), ("vie_Latn", "vi"), ("vie-Latn", "vi"), ("VIE_LATN", "vi"),
        ("cmn", "zh"), ("zho_Hans", "zh"), ("zho-CN", "zh"), ("zh_cn", "zh"), ("zh-Hans", "zh"), ("cmn_Hans", "zh"),
        ("zho_Hant", "zho_Hant"), ("zho-TW", "zho_Hant"), ("zh-TW", "zho_Hant"), ("zh_hk", "zho_Hant"),
        ("zh-Hant-HK", "zho_Hant"), ("ara", "ar"), ("arb", "ar"), ("arb_Latn", "arb_Latn"), ("por-BR", "pt"),
        ("pt-BR", "pt"), ("srp-Cyrl", "sr"), ("nb", "no"), ("iw", "he"), ("fil", "tl"), ("ace_Latn", "ace_Latn"),
        ("ace", "ace_Latn"), ("ace_Arab", "ace_Arab"), ("ceb", "ceb_Latn"), ("min", "min_Latn"),
    ],
)  # fmt: skip
def test_lookup_by_any_code(written, code):
    assert find_language(written).code == code


def test_flores_has_203_languages_beside_english_and_134_two_letter_codes():
    codes = flores_languages()
    assert len(set(codes)) == len(codes) == 203
    assert sum(len(code) == 2 for code in codes) == 134
    assert {"vi", "zh", "zho_Hant", "ace_Latn"} <= set(codes)
    assert not {"en", "br", "la"} & set(codes)


def test_no_two_languages_share_a_code():
    codes = [*flores_languages(), "en", "br", "la", "dv"]
    assert [find_language(code).code for code in codes] == codes
    flores = [find_language(code).flores for code in codes]
    assert [find_language(code).code for code in flores] == codes
    assert all(re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", code) for code in flores)
    bare = [code for language in map(find_language, codes) for code in language.iso639_3]
    assert len(set(bare)) == len(bare)


def test_a_second_script_never_reads_the_first_scripts_files():
    for code in ("arb_Latn", "ace_Arab", "min_Arab", "kas_Deva"):
        language = find_language(code)
        assert language.iso639_3 == ()
        assert language.ntrex == (code.replace("_", "-"),)


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("vn", "Vietnamese is vi"),
        ("Vietnamese", "Vietnamese is vi"),
        ("vietnamise", "Vietnamese is vi"),
        ("jp", "Japanese is ja"),
        ("vie_Latm", "Vietnamese is vie_Latn here"),
        ("sr_Latn", "Serbian is srp_Cyrl here"),
        ("xq", "allowed: ISO 639-1 codes (vi) and FLORES codes (vie_Latn)"),
        ("zuu_Latn", "nearest: zul_Latn"),
        ("", "allowed: ISO 639-1"),
    ],
)
def test_an_unknown_code_is_refused_with_what_may_be_meant(code, part):
    with pytest.raises(UsageError) as error:
        find_language(code)
    assert part in str(error.value)
    assert repr(code) in str(error.value)
    assert "\n" not in str(error.value)
