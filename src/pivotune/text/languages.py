"""Languages and the codes that publishers name their files by.

One row per FLORES-200 language (README of facebookresearch/flores, `flores200`): its code, the two-letter ISO 639-1 code
where it has one, other ISO 639-3 codes that data sets use for it (mostly the macro-language's), and its English name. `*`
marks a language's second script: the bare codes mean its first. A few languages that only other sets have follow.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache

from pivotune.errors import UsageError

_FLORES_200 = """
ace_Arab - * Acehnese (Arabic script)
ace_Latn - - Acehnese (Latin script)
acm_Arab - - Mesopotamian Arabic
acq_Arab - - Ta'izzi-Adeni Arabic
aeb_Arab - - Tunisian Arabic
afr_Latn af - Afrikaans
ajp_Arab - - South Levantine Arabic
aka_Latn ak - Akan
als_Latn sq sqi Albanian
amh_Ethi am - Amharic
apc_Arab - - North Levantine Arabic
arb_Arab ar ara Arabic
arb_Latn - * Arabic (Latin script)
ars_Arab - - Najdi Arabic
ary_Arab - - Moroccan Arabic
arz_Arab - - Egyptian Arabic
asm_Beng as - Assamese
ast_Latn - - Asturian
awa_Deva - - Awadhi
ayr_Latn ay aym Aymara
azb_Arab - - South Azerbaijani
azj_Latn az aze Azerbaijani
bak_Cyrl ba - Bashkir
bam_Latn bm - Bambara
ban_Latn - - Balinese
bel_Cyrl be - Belarusian
bem_Latn - - Bemba
ben_Beng bn - Bengali
bho_Deva - - Bhojpuri
bjn_Arab - * Banjar (Arabic script)
bjn_Latn - - Banjar (Latin script)
bod_Tibt bo - Tibetan
bos_Latn bs - Bosnian
bug_Latn - - Buginese
bul_Cyrl bg - Bulgarian
cat_Latn ca - Catalan
ceb_Latn - - Cebuano
ces_Latn cs - Czech
cjk_Latn - - Chokwe
ckb_Arab - - Central Kurdish
crh_Latn - - Crimean Tatar
cym_Latn cy - Welsh
dan_Latn da - Danish
deu_Latn de - German
dik_Latn - - Southwestern Dinka
dyu_Latn - - Dyula
dzo_Tibt dz - Dzongkha
ell_Grek el - Greek
eng_Latn en - English
epo_Latn eo - Esperanto
est_Latn et - Estonian
eus_Latn eu - Basque
ewe_Latn ee - Ewe
fao_Latn fo - Faroese
fij_Latn fj - Fijian
fin_Latn fi - Finnish
fon_Latn - - Fon
fra_Latn fr - French
fur_Latn - - Friulian
fuv_Latn ff fuc Fulfulde
gaz_Latn om orm Oromo
gla_Latn gd - Scottish Gaelic
gle_Latn ga - Irish
glg_Latn gl - Galician
grn_Latn gn - Guarani
guj_Gujr gu - Gujarati
hat_Latn ht - Haitian Creole
hau_Latn ha - Hausa
heb_Hebr he - Hebrew
hin_Deva hi - Hindi
hne_Deva - - Chhattisgarhi
hrv_Latn hr - Croatian
hun_Latn hu - Hungarian
hye_Armn hy - Armenian
ibo_Latn ig - Igbo
ilo_Latn - - Ilocano
ind_Latn id - Indonesian
isl_Latn is - Icelandic
ita_Latn it - Italian
jav_Latn jv - Javanese
jpn_Jpan ja - Japanese
kab_Latn - - Kabyle
kac_Latn - - Jingpho
kam_Latn - - Kamba
kan_Knda kn - Kannada
kas_Arab ks - Kashmiri
kas_Deva - * Kashmiri (Devanagari script)
kat_Geor ka - Georgian
kaz_Cyrl kk - Kazakh
kbp_Latn - - Kabiye
kea_Latn - - Kabuverdianu
khk_Cyrl mn mon Mongolian
khm_Khmr km - Khmer
kik_Latn ki - Kikuyu
kin_Latn rw - Kinyarwanda
kir_Cyrl ky - Kyrgyz
kmb_Latn - - Kimbundu
kmr_Latn ku kur Kurdish
knc_Arab - * Kanuri (Arabic script)
knc_Latn kr kau Kanuri
kon_Latn kg - Kikongo
kor_Hang ko - Korean
lao_Laoo lo - Lao
lij_Latn - - Ligurian
lim_Latn li - Limburgish
lin_Latn ln - Lingala
lit_Latn lt - Lithuanian
lmo_Latn - - Lombard
ltg_Latn - - Latgalian
ltz_Latn lb - Luxembourgish
lua_Latn - - Luba-Kasai
lug_Latn lg - Ganda
luo_Latn - - Luo
lus_Latn - - Mizo
lvs_Latn lv lav Latvian
mag_Deva - - Magahi
mai_Deva - - Maithili
mal_Mlym ml - Malayalam
mar_Deva mr - Marathi
min_Arab - * Minangkabau (Arabic script)
min_Latn - - Minangkabau (Latin script)
mkd_Cyrl mk - Macedonian
mlt_Latn mt - Maltese
mni_Beng - - Meitei
mos_Latn - - Mossi
mri_Latn mi - Maori
mya_Mymr my - Burmese
nld_Latn nl - Dutch
nno_Latn nn - Norwegian Nynorsk
nob_Latn no nor Norwegian
npi_Deva ne nep Nepali
nso_Latn - - Northern Sotho
nus_Latn - - Nuer
nya_Latn ny - Nyanja
oci_Latn oc - Occitan
ory_Orya or ori Odia
pag_Latn - - Pangasinan
pan_Guru pa - Punjabi
pap_Latn - - Papiamento
pbt_Arab ps pus Pashto
pes_Arab fa fas Persian
plt_Latn mg mlg Malagasy
pol_Latn pl - Polish
por_Latn pt - Portuguese
prs_Arab - - Dari
quy_Latn qu que Quechua
ron_Latn ro - Romanian
run_Latn rn - Rundi
rus_Cyrl ru - Russian
sag_Latn sg - Sango
san_Deva sa - Sanskrit
sat_Olck - - Santali
scn_Latn - - Sicilian
shn_Mymr - - Shan
sin_Sinh si - Sinhala
slk_Latn sk - Slovak
slv_Latn sl - Slovenian
smo_Latn sm - Samoan
sna_Latn sn - Shona
snd_Arab sd - Sindhi
som_Latn so - Somali
sot_Latn st - Southern Sotho
spa_Latn es - Spanish
srd_Latn sc - Sardinian
srp_Cyrl sr - Serbian
ssw_Latn ss - Swati
sun_Latn su - Sundanese
swe_Latn sv - Swedish
swh_Latn sw swa Swahili
szl_Latn - - Silesian
tam_Taml ta - Tamil
taq_Latn - - Tamasheq (Latin script)
taq_Tfng - * Tamasheq (Tifinagh script)
tat_Cyrl tt - Tatar
tel_Telu te - Telugu
tgk_Cyrl tg - Tajik
tgl_Latn tl fil Tagalog
tha_Thai th - Thai
tir_Ethi ti - Tigrinya
tpi_Latn - - Tok Pisin
tsn_Latn tn - Tswana
tso_Latn ts - Tsonga
tuk_Latn tk - Turkmen
tum_Latn - - Tumbuka
tur_Latn tr - Turkish
twi_Latn tw - Twi
tzm_Tfng - - Central Atlas Tamazight
uig_Arab ug - Uyghur
ukr_Cyrl uk - Ukrainian
umb_Latn - - Umbundu
urd_Arab ur - Urdu
uzn_Latn uz uzb Uzbek
vec_Latn - - Venetian
vie_Latn vi - Vietnamese
war_Latn - - Waray
wol_Latn wo - Wolof
xho_Latn xh - Xhosa
ydd_Hebr yi yid Yiddish
yor_Latn yo - Yoruba
yue_Hant - - Cantonese
zho_Hans zh cmn Chinese
zho_Hant - * Traditional Chinese
zsm_Latn ms msa Malay
zul_Latn zu - Zulu
"""
# Beyond FLORES-200: NTREX-128, Tatoeba, and what users fine-tune for.
_OTHERS = """
abk_Cyrl ab - Abkhazian
arg_Latn an - Aragonese
bre_Latn br - Breton
chv_Cyrl cv - Chuvash
cor_Latn kw - Cornish
cos_Latn co - Corsican
div_Thaa dv - Divehi
fry_Latn fy - Western Frisian
glv_Latn gv - Manx
ido_Latn io - Ido
ile_Latn ie - Interlingue
ina_Latn ia - Interlingua
kal_Latn kl - Greenlandic
lat_Latn la - Latin
nav_Latn nv - Navajo
nde_Latn nd - North Ndebele
oss_Cyrl os - Ossetian
roh_Latn rm - Romansh
tah_Latn ty - Tahitian
ton_Latn to - Tongan
ven_Latn ve - Venda
vol_Latn vo - Volapük
wln_Latn wa - Walloon
"""
_SECOND_SCRIPT = "*"
_RETIRED = {"iw": "he", "in": "id", "ji": "yi", "jw": "jv", "nb": "no", "zho": "zh", "chi": "zh"}
# What says that Chinese is meant in traditional characters: a script or a region.
_TRADITIONAL = frozenset(("hant", "tw", "hk", "mo"))
_COUNTRIES = {
    "vn": "vi",
    "cn": "zh",
    "jp": "ja",
    "kr": "ko",
    "cz": "cs",
    "ua": "uk",
    "gr": "el",
    "dk": "da",
    "ir": "fa",
}
_NTREX_CHINESE = {"zho_Hans": "zho-CN", "zho_Hant": "zho-TW"}
_NTREX_REGIONAL = {"pt": ("por-BR",), "es": ("spa-MX",), "fr": ("fra-CA",)}
_NEAREST = 3


@dataclass(frozen=True, slots=True)
class Language:
    """One language, in one script.

    Attributes:
        code: two-letter ISO 639-1 code; the FLORES code for a language without one, or in its second script.
        flores: FLORES-200 code (`vie_Latn`).
        iso639_3: three-letter codes that files may be named by, likeliest first (`arb`, `ara`; `cmn` for Chinese); none
            for a second script.
        name: in English, as prompts say it.
        in_flores: whether FLORES-200 has it.
    """

    code: str
    flores: str
    iso639_3: tuple[str, ...]
    name: str
    in_flores: bool

    @property
    def script(self) -> str:
        """ISO 15924 code (`Latn`)."""
        return self.flores.partition("_")[2]

    @property
    def is_chinese(self) -> bool:
        """Whether it is written in Chinese characters alone, which stand for words."""
        return self.script in ("Hans", "Hant")

    @property
    def ntrex(self) -> tuple[str, ...]:
        """Codes that NTREX-128's files may have, likeliest first: `vie`, `zho-CN`, `srp-Cyrl`; regional ones last."""
        if self.flores in _NTREX_CHINESE:
            return (_NTREX_CHINESE[self.flores],)
        codes = self.iso639_3 or (self.flores.partition("_")[0],)
        in_script = tuple(f"{code}-{self.script}" for code in codes)
        return (*self.iso639_3, *in_script, *_NTREX_REGIONAL.get(self.code, ()))


@cache
def find_language(code: str) -> Language:
    """The language of a code: ISO 639-1 (`vi`), FLORES (`vie_Latn`), ISO 639-3, NTREX, or a tag (`zh-TW`, `pt-BR`).

    Regions other than Chinese ones are passed over: sets have one text for a language and script.

    Raises:
        UsageError: unknown, or not in that script; with the nearest codes.
    """
    base, *rest = re.split("[-_]", code.strip().lower())
    known = _by_any_code()
    language = known.get("_".join([base, *rest])) or known.get(_RETIRED.get(base, base))
    if language is None:
        raise UsageError(f"language {code!r} is unknown; {_nearest(code)}")
    if language.code == "zh" and _TRADITIONAL.intersection(rest):
        return known["zho_hant"]
    scripts = [part for part in rest if len(part) == 4 and part.isalpha() and part != language.script.lower()]
    if scripts:
        raise UsageError(f"language {code!r} is unknown: {language.name} is {language.flores} here; {_nearest(code)}")
    return language


def language_name(code: str) -> str:
    """The language's English name (`vi` -> `Vietnamese`); errors as in `find_language`."""
    return find_language(code).name


@cache
def flores_languages() -> tuple[str, ...]:
    """`Language.code` of every language of FLORES-200 other than English."""
    return tuple(language.code for language in _languages() if language.in_flores and language.code != "en")


@cache
def _languages() -> tuple[Language, ...]:
    return tuple(
        _parse(row, in_flores=table is _FLORES_200)
        for table in (_FLORES_200, _OTHERS)
        for row in table.strip().splitlines()
    )


def _parse(row: str, *, in_flores: bool) -> Language:
    flores, two_letters, others, name = row.split(maxsplit=3)
    base = flores.partition("_")[0]
    iso639_3 = () if others == _SECOND_SCRIPT else (base, *others.replace("-", "").split(","))
    if two_letters == "zh":  # sets that have no scripts name the individual language
        iso639_3 = ("cmn",)
    code = flores if two_letters == "-" else two_letters
    return Language(code, flores, tuple(filter(None, iso639_3)), name, in_flores)


@cache
def _by_any_code() -> dict[str, Language]:
    """Every code of every language, in lower case with `_`."""
    return {
        name.lower(): language
        for language in _languages()
        for name in (language.code, language.flores, *language.iso639_3)
    }


def _nearest(code: str) -> str:
    wanted = code.strip()
    names = {language.name: language.code for language in _languages()}
    by_name = difflib.get_close_matches(wanted.title(), names, n=1, cutoff=0.8)
    if by_name or wanted.lower() in _COUNTRIES:
        meant = names[by_name[0]] if by_name else _COUNTRIES[wanted.lower()]
        return f"{find_language(meant).name} is {meant}"
    codes = dict.fromkeys(code for language in _languages() for code in (language.code, language.flores))
    near = difflib.get_close_matches(wanted, codes, n=_NEAREST, cutoff=0.4)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    return f"{nearest}allowed: ISO 639-1 codes (vi) and FLORES codes (vie_Latn)"
