"""Unit text -> dimension and factor: "km/h", "square feet", "米", "cm^2", "million dollars".

A unit that is not in the table is kept as its words: two of them agree when one's words are among the
other's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards.math_words import split

CURRENCIES = frozenset("$€£¥￥₹¢₽₩")


_LINES = """
m 1 m meter meters metre metres 米
m 1/100 cm centimeter centimeters centimetre centimetres 厘米
m 1/1000 mm millimeter millimeters millimetre millimetres 毫米
m 1000 km kilometer kilometers kilometre kilometres 千米 公里
m 1/10 dm decimeter decimeters 分米
m 1/1000000 µm um micrometer micrometers micron microns
m 1/1000000000 nm nanometer nanometers
m 1/10000000000 angstrom angstroms
m 0.3048 ft foot feet
m 0.0254 inch inches in
m 0.9144 yd yard yards
m 1609.344 mi mile miles
s 1 s sec secs second seconds 秒
s 60 min mins minute minutes 分钟 分
s 3600 h hr hrs hour hours 小时 时
s 86400 day days 天 日
s 604800 week weeks 周 星期
s 1/1000 ms millisecond milliseconds
month 1 month months 个月 月
month 12 year years yr yrs 年
month 120 decade decades
g 1 g gram grams 克
g 1000 kg kilogram kilograms 千克 公斤
g 1/1000 mg milligram milligrams
g 453.59237 lb lbs pound pounds
g 28.349523125 oz ounce ounces
g 1000000 ton tons tonne tonnes 吨
L 1 l L liter liters litre litres 升
L 1/1000 ml mL milliliter milliliters 毫升
gal 1 gal gallon gallons
gal 1/4 quart quarts
gal 1/8 pint pints
gal 1/16 cup cups
usd 1 dollar dollars usd USD 美元
usd 1/100 cent cents ¢
yuan 1 yuan rmb RMB 元 块 人民币 ¥ ￥
eur 1 euro euros eur EUR 欧元 €
gbp 1 gbp GBP £
rad 1 rad rads radian radians 弧度
deg 1 deg degree degrees 度
N 1 N newton newtons
N 1000 kN
J 1 J joule joules
J 1000 kJ
W 1 W watt watts
W 1000 kW
Hz 1 Hz hertz
Hz 1000 kHz
Hz 1000000 MHz
Pa 1 Pa pascal pascals
Pa 1000 kPa
V 1 V volt volts
A 1 amp amps ampere amperes
K 1 K kelvin kelvins
C 1 C coulomb coulombs
T 1 T tesla
F 1 F farad farads
ohm 1 Ω ohm ohms
Wb 1 Wb
eV 1 eV
eV 1000 keV
eV 1000000 MeV
cal 1 cal calorie calories
cal 1000 kcal
arcsec 1 arcsecond arcseconds arcsec
arcsec 60 arcminute arcminutes arcmin
mol 1 mol mole moles
°C 1 °C celsius
°F 1 °F fahrenheit
m/s 0.44704 mph
m/s 5/18 kmh kph
- 12 dozen
- 1000 thousand
- 1000000 million
- 1000000000 billion
- 1000000000000 trillion
- 10000 万
- 100000000 亿
"""


def _table() -> dict[str, tuple[str, Fraction]]:
    """word -> (dimension, factor to its own unit). A count such as "million" has the dimension ""."""
    table: dict[str, tuple[str, Fraction]] = {}
    for line in _LINES.strip().splitlines():
        dimension, factor, *names = line.split()
        table.update(dict.fromkeys(names, ("" if dimension == "-" else dimension, Fraction(factor))))
    return table


_TABLE = _table()
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3, "cu": 3, "平方": 2, "立方": 3}
# "5 units": no more than "5". 个, 名, ... are Chinese measure words.
_FILLER = split(
    "unit units 个 名 位 只 本 种 次 人 岁 条 张 件 支 块钱 辆 棵 页 套 组 of in the a an is total"
)
# Words that make what stands before them more, or less, than a value.
_CLAIMS = split(
    "or and not no more less least most than wrong incorrect if unless to between plus minus "
    "times except approximately about either neither but maybe perhaps mod when where for "
    "cannot isn't isnt never instead greater fewer above below 或 不 以上 以下"
)
_PIECE = re.compile(r"[A-Za-z°µΩ¢'_]+|\d+|[\u3400-\u9fff]+|\^\s*\{?\s*(-?\d+)\s*\}?|[/*·]|\S")
_CJK_POWER = re.compile("^(平方|立方)(.+)$")
_TEMPERATURE = re.compile(r"deg(?:ree)?s?\s+([CF])(?:elsius|ahrenheit)?(?![A-Za-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Unit:
    """What stands behind a value.

    Attributes:
        dimensions: sorted (name, exponent) pairs; None for words outside the table, () for a count.
        factor: to the dimensions' own units.
        words: what was written, singular and in lower case.
        is_claim: the text says more than a unit, such as "or more".
    """

    dimensions: tuple[tuple[str, int], ...] | None
    factor: Fraction
    words: frozenset[str]
    is_claim: bool


def is_unit_word(word: str) -> bool:
    """Whether a bare word after a number is a unit. A single letter is a variable there."""
    return len(word) > 1 and (
        word in _TABLE or word in _POWERS or word in ("pct", "percent", "percentage", "pm", "am", "PM", "AM")
    )


@lru_cache(maxsize=4096)
def parse_unit(text: str) -> Unit:
    """The unit that a trailing text means."""
    text = _TEMPERATURE.sub(lambda match: "°" + match.group(1).upper(), text)
    dimensions: dict[str, int] = {}
    factor, words, known, sign, power = Fraction(1), [], True, 1, 1
    pieces = list(_PIECE.finditer(text))
    for index, match in enumerate(pieces):
        piece = match.group()
        if match.group(1) is not None:
            known = known and index > 0
            continue
        if piece in ("/", "per", "每"):
            sign = -1
            continue
        if piece in _POWERS:
            power = _POWERS[piece]
            continue
        if cjk := _CJK_POWER.match(piece):
            power, piece = _POWERS[cjk.group(1)], cjk.group(2)
        following = pieces[index + 1] if index + 1 < len(pieces) else None
        is_inch = piece == "in" and (following is None or following.group(1) is not None)
        if piece in "*·.,()" or (piece.lower() in _FILLER and not is_inch):
            continue
        entry = _TABLE.get(piece) or _TABLE.get(piece.lower())
        words.append(piece.casefold())
        if entry is None:
            known = False
            continue
        if following is not None and following.group(1) is not None and len(following.group(1)) < 3:
            power = int(following.group(1))
        elif following is not None and following.group() in ("squared", "cubed"):
            power = _POWERS[following.group()]
        for part, direction in zip(entry[0].split("/"), (1, -1), strict=False):
            if part:
                dimensions[part] = dimensions.get(part, 0) + sign * power * direction
        factor *= entry[1] ** (sign * power)
        power = 1
    is_claim = len(words) > 6 or any(word in _CLAIMS or any(c.isdigit() for c in word) for word in words)
    is_claim = is_claim and words != ["times"]
    stems = frozenset(_stem(word) for word in words)
    pairs = tuple(sorted((name, exponent) for name, exponent in dimensions.items() if exponent))
    return Unit(pairs if known else None, factor if known else Fraction(1), stems, is_claim)


_STERLING = (("gbp", 1),)  # "pounds" are a mass, except beside a £


def _stem(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def units_agree(gold: Unit, prediction: Unit) -> bool:
    """Whether two written units may belong to one answer; known ones must have the same dimensions."""
    if gold.dimensions is not None and prediction.dimensions is not None:
        is_money = _STERLING in (gold.dimensions, prediction.dimensions)
        if is_money and (gold.words == {"pound"} or prediction.words == {"pound"}):
            return True
        return gold.dimensions == prediction.dimensions
    if not gold.words or not prediction.words:
        return True
    return gold.words <= prediction.words or prediction.words <= gold.words
