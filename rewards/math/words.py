"""The vocabulary: LaTeX commands, plain words, Unicode signs and the tokens they stand for.

A table holds entries "kind value names" separated by semicolons; "-" is an empty value.
"""

from __future__ import annotations

from typing import Any


def split(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(text: str) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    for item in text.strip().split(";"):
        kind, value, *names = item.split()
        entry: Any = int(value) if kind == "pm" else "" if value == "-" else value
        found.update(dict.fromkeys(names, (kind, entry)))
    return found


_FUNCTION_NAMES = """
sin; cos; tan tg; cot ctg; sec; csc; sinh; cosh; tanh; coth; sech; csch; asin arcsin; acos arccos; atan
arctan arctg; acot arccot; asec arcsec; acsc arccsc; asinh arcsinh arsinh; acosh arccosh arcosh; atanh
arctanh artanh; acoth arccoth; ln; log; lg; exp; abs; sgn sign; gcd hcf; lcm; max; min; floor; ceil ceiling;
erf; Re; Im; arg; det; conj; cis
"""
_FUNCTION_TABLE: dict[str, tuple[str, Any]] = {
    name: ("fn", entry.split()[0]) for entry in _FUNCTION_NAMES.split(";") for name in entry.split()
}
FUNCTIONS: dict[str, str] = {name: value for name, (_, value) in _FUNCTION_TABLE.items()}
_GREEK = split("""
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi omicron rho
varrho sigma varsigma tau upsilon phi varphi chi psi omega Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega
""")
_LETTER_LIKE = split("ell hbar aleph mho odot oplus star bullet dagger top bot wp Pi intercal")
_RELATIONS = """
= := coloneqq triangleq; == equiv; < lt; > gt; <= =< le leq leqslant leqq; >= ge geq geqslant geqq;
!= /= ne neq; ~ ~= approx thickapprox simeq cong doteq; in; notin; sim
"""
RELATIONS = {name: entry.split()[0] for entry in _RELATIONS.split(";") for name in entry.split()}
COMMANDS: dict[str, tuple[str, Any]] = {
    **{name: ("sym", name.removeprefix("var")) for name in _GREEK | _LETTER_LIKE},
    **{name: ("rel", relation) for name, relation in RELATIONS.items()},
    **_FUNCTION_TABLE,
    **_table("""
cmd frac frac dfrac tfrac cfrac nicefrac sfrac; cmd binom binom dbinom tbinom; cmd sqrt sqrt;
cmd choose choose; cmd over over; cmd begin begin; cmd end end;
cmd accent overline bar hat dot ddot widehat tilde; cmd vector vec overrightarrow; op * cdot times ast;
op / div; op | mid vert lvert rvert; op << langle; op >> rangle; op \\{ lbrace; op \\} rbrace; op [ lbrack;
op ] rbrack; op : colon; op ' prime; sym P Pr; mod residue pmod; mod remainder bmod mod; sep or lor vee;
sep and land wedge; dots ... ldots dots cdots dotsc dotsb vdots ddots hdots; set0 - emptyset varnothing;
setop cup cup bigcup; setop cap cap bigcap; setop minus setminus backslash smallsetminus; deg - degree deg;
circ - circ; pm 1 pm; pm -1 mp; const pi pi; const inf infty infin; const i imath; sym j jmath; big sum sum;
big prod prod; open floor lfloor; close floor rfloor; open ceil lceil; close ceil rceil; fn zeta zeta;
fn gamma Gamma; prefix angle angle; prefix triangle triangle; domain R R reals; domain Z Z; domain N N;
domain Q Q; domain C C; cur £ pounds; cur € euro; cur ¥ yen
"""),
}
CALCULUS = split("int iint iiint oint lim limsup liminf partial nabla")
WORDS: dict[str, tuple[str, Any]] = {
    **{name: _FUNCTION_TABLE[name] for name in _FUNCTION_TABLE.keys() - split("arg det Re Im tg")},
    **{name: ("sym", name) for name in _GREEK if len(name) > 2},
    **_table("""
const pi pi; const inf inf infty infinity Infinity oo; cmd sqrt sqrt; pm 1 pm; setop cup cup union;
op : to 比; text if if; rel = equals; sep or or OR Or 或 或者; sep and and AND And & 和 及 且 以及 与
"""),
}
DROPPED = split("""
left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr quad qquad displaystyle
textstyle scriptstyle limits nolimits underline boxed fbox bf rm it hfill ensuremath mathop mathord mathbin
mathstrut hline square blacksquare Box blacksquare checkmark tiny scriptsize footnotesize small normalsize
LARGE huge Huge boldmath large Large null normalfont qed par noindent relax therefore
""")
MATH_STYLES = split("mathrm mathbf mathit mathsf mathtt mathcal mathbb mathfrak mathscr boldsymbol bm")
TEXT_STYLES = MATH_STYLES | split("""
text textbf textit textrm textsf texttt textnormal textup textmd mbox hbox operatorname emph pmb
""")
# Three consecutive letters that are a word and not a product of variables.
SHORT_WORDS = split("""
odd yes all one two six ten the any for not day men won sum max min are has cat dog red sun mon tue wed thu
fri sat dne
""")
_COUNTED = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty
"""
NUMBER_WORDS = {word: number for number, word in enumerate(_COUNTED.split())}
_NOTHING = "no solution,no solutions,empty set,no real solution,no real solutions,none,无解,空集"
_EVERYTHING = "all real numbers,all reals,all real,the real numbers,real numbers,全体实数,任意实数"
EMPTY_WORDS, REAL_WORDS = frozenset(_NOTHING.split(",")), frozenset(_EVERYTHING.split(","))
# Words before a value that do not change it.
INTRODUCTIONS = split("""
the a an answer is are final approximately about approx roughly nearly equals equal to solution value total
exactly of so thus hence therefore there option choice letter result maximum minimum largest smallest
greatest possible sum product area number remainder point
""")

_SAME_THING = ("or equivalently", "or simply", "equivalently", "that is", "i.e.", "i.e")
WORDS |= dict.fromkeys(_SAME_THING, ("sep", "or"))
_GREEK_ORDER = """
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi
omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega
"""
_GREEK_LETTERS = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", _GREEK_ORDER.split(), strict=True))
_BLANKS = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_ZERO_WIDTH = "\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\ufeff"
# fmt: off
CHARACTERS: dict[str, str] = {
    **{character: f"\\{name} " for character, name in _GREEK_LETTERS.items()},
    **dict.fromkeys("−–—‐‑﹣－", "-"),
    **dict.fromkeys("·⋅•∙", "\\cdot "),
    **dict.fromkeys(_BLANKS, " "),
    **dict.fromkeys(_ZERO_WIDTH, ""),
    **dict.fromkeys("≤⩽≦", "\\le "), **dict.fromkeys("≥⩾≧", "\\ge "), **dict.fromkeys("≈≃≅", "\\approx "),
    **dict.fromkeys("∅ø⌀", "\\emptyset "), **dict.fromkeys("′’‘ʹ", "'"), **dict.fromkeys("°º˚", "^\\circ "),
    **dict.fromkeys("，、﹐", ","), **dict.fromkeys("。．", "."), **dict.fromkeys("【〔", "["),
    **dict.fromkeys("】〕", "]"), **dict.fromkeys("“”", " "), **dict.fromkeys("…⋯", "\\ldots "),
    **dict.fromkeys("×✕", "\\times "), **dict.fromkeys("∕⁄", "/"),
"÷": "\\div ", "∶": ":", "√": "\\sqrt ", "∛": "\\sqrt[3]", "∞": "\\infty ", "≠": "\\ne ", "∪": "\\cup ",
    "∩": "\\cap ", "∖": "\\setminus ", "∈": "\\in ", "±": "\\pm ", "∓": "\\mp ", "∨": "\\lor ",
    "∧": "\\land ", "⟨": "\\langle ", "⟩": "\\rangle ", "⌊": "\\lfloor ", "⌋": "\\rfloor ",
    "⌈": "\\lceil ", "⌉": "\\rceil ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}",
    "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}", "∠": "\\angle ", "△": "\\triangle ", "∑": "\\sum ",
    "∏": "\\prod ", "∫": "\\int ", "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}",
    "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅛": "\\frac{1}{8}",
    "℃": "^\\circ C", "℉": "^\\circ F", "ⅈ": "i", "ⅇ": "e", "″": "''",
}
# fmt: on
_ZEROS = (
    "\u0660\u06f0\u0966\u09e6\u0a66\u0ae6\u0be6\u0c66\u0ce6\u0d66\u0e50\u0ed0\u1040\u17e0"  # Arabic to Khmer
)
CHARACTERS |= {chr(ord(zero) + digit): str(digit) for zero in _ZEROS for digit in range(10)}
CHARACTERS |= {"\u066b": ".", "\u066c": ",", "\u066a": "%", "\u06d4": ".", "\u0964": "."}
TRANSLATION = str.maketrans(
    CHARACTERS
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) not in CHARACTERS}
)
