"""Unit text -> dimension and factor: "km/h", "square feet", "米", "cm^2", "million dollars".

A unit outside the table is kept as its words: two agree if the words of one are among those of the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rewards.math.words import split

CURRENCIES = frozenset("$€£¥￥₹¢₽₩")
_LINES = """
m 1 m meter meters metre metres 米; m 1/100 cm centimeter centimeters centimetre centimetres 厘米;
m 1/1000 mm millimeter millimeters millimetre millimetres 毫米;
m 1000 km kilometer kilometers kilometre kilometres 千米 公里; m 1/10 dm decimeter decimeters 分米;
m 1/1000000 um micrometer micrometers micron microns; m 1/1000000000 nm nanometer nanometers;
m 1/10000000000 angstrom angstroms Å; m 0.3048 ft foot feet; m 0.0254 inch inches in;
m 0.9144 yd yard yards; m 1609.344 mi mile miles; s 1 s sec secs second seconds 秒;
s 60 min mins minute minutes 分钟 分; s 3600 h hr hrs hour hours 小时 时; s 86400 day days 天 日;
s 604800 week weeks 周 星期; s 1/1000 ms millisecond milliseconds; month 1 month months 个月 月;
month 12 year years yr yrs 年; month 120 decade decades; g 1 g gram grams 克;
g 1000 kg kilogram kilograms 千克 公斤; g 1/1000 mg milligram milligrams; g 453.59237 lb lbs pound pounds;
g 28.349523125 oz ounce ounces; g 1000000 ton tons tonne tonnes 吨;
m3 1/1000 l L liter liters litre litres 升;
m3 1/1000000 ml mL milliliter milliliters millilitre millilitres cc 毫升;
m3 0.003785411784 gal gallon gallons; m3 0.000946352946 quart quarts; m3 0.000473176473 pint pints;
m3 0.0002365882365 cup cups; m2 10000 ha hectare hectares 公顷; m2 4046.8564224 acre acres;
usd 1 dollar dollars usd USD 美元; usd 1/100 cent cents ¢; yuan 1 yuan rmb RMB CNY 元 块 人民币 ¥ ￥;
eur 1 euro euros eur EUR 欧元 €; gbp 1 gbp GBP £; inr 1 rs Rs inr INR rupee rupees ₹;
rad 1 rad rads radian radians 弧度; deg 1 deg degree degrees 度; g*m/s2 1000 N newton newtons;
g*m2/s2 1000 J joule joules; g*m2/s2 4184 kcal; g*m2/s2 4.184 cal calorie calories; g*m2/s2 3600000000 kWh;
g*m2/s3 1000 W watt watts; /s 1 Hz hertz; g/m*s2 1000 Pa pascal pascals; g/m*s2 101325000 atm;
g*m2/s3*A 1000 V volt volts; A 1 A amp amps ampere amperes; K 1 K kelvin kelvins; A*s 1 C coulomb coulombs;
g/s2*A 1000 T tesla; F 1 F farad farads; g*m2/s3*A2 1000 Ω ohm ohms; g*m2/s2*A 1000 Wb weber; eV 1 eV;
arcsec 1 arcsecond arcseconds arcsec; arcsec 60 arcminute arcminutes arcmin; mol 1 mol mole moles;
°C 1 °C celsius; °F 1 °F fahrenheit; m/s 0.44704 mph; m/s 5/18 kmh kph; - 12 dozen dozens;
- 100 hundred hundreds; - 1000 thousand thousands 千; - 1000000 million millions;
- 1000000000 billion billions; - 1000000000000 trillion trillions; - 10000 万; - 100000000 亿
"""
_PREFIXES = {"k": 3, "M": 6, "G": 9, "c": -2, "d": -1, "m": -3, "µ": -6, "u": -6, "n": -9, "p": -12}
_PREFIXED = split("m s g L l N J W Hz Pa V A C T F Ω Wb eV mol")
_BARE_PREFIXED = split("kN kJ kW kHz MHz GHz kPa MPa kV keV MeV GeV MJ MW mL mA mV mol cL dL")


def _table() -> dict[str, tuple[dict[str, int], Fraction]]:
    """word -> (exponents of dimensions, factor). A count such as "million" has no dimension."""
    table: dict[str, tuple[dict[str, int], Fraction]] = {}
    for line in _LINES.strip().split(";"):
        formula, factor, *names = line.split()
        exponents: dict[str, int] = {}
        for part, sign in zip(formula.split("/"), (1, -1), strict=False):
            for name in part.split("*") if part.strip("-") else ():
                exponents[name.rstrip("23")] = sign * int(name[-1] if name[-1] in "23" else 1)
        table.update(dict.fromkeys(names, (exponents, Fraction(factor))))
    return table


_WORDS = _table()  # units as bare words, too; the others only inside \\text or beside a unit
_TABLE = {
    prefix + name: (_WORDS[name][0], _WORDS[name][1] * Fraction(10) ** power)
    for name in _PREFIXED
    for prefix, power in _PREFIXES.items()
    if prefix + name != "pm"
} | _WORDS
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3, "cu": 3, "平方": 2, "立方": 3}
_MARKS = split("pct percent percentage pm am PM AM")
# "5 units": no more than "5". 个, 名, ... are Chinese measure words.
_FILLER = split(
    "unit units 个 名 位 只 本 种 次 人 岁 条 张 件 支 块钱 辆 棵 页 套 组 of in the a an is total"
)
# Words that turn the value before them into a bound or a guess.
CLAIMS = split(
    "or and not no more less least most than wrong incorrect if unless to between plus minus "
    "times except approximately about either neither but maybe perhaps mod when where for "
    "cannot isn't isnt never instead greater fewer above below 或 不 以上 以下"
)
_PIECE = re.compile(r"[A-Za-z°µΩ¢'_]+|\d+|[\u3400-\u9fff]+|\^\s*\{?\s*(-?\d+)\s*\}?|[/*·]|\S")
_CJK_POWER = re.compile("^(平方|立方)(.+)$")
_CJK_COUNT = re.compile("([万亿])(?=[\u3400-\u9fff])")
_TEMPERATURE = re.compile(r"deg(?:ree)?s?\s+([CF])(?:elsius|ahrenheit)?(?![A-Za-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit text after a value.

    Attributes:
        dimensions: sorted (name, exponent) pairs; None for words outside the table.
        factor: conversion to the base units of the dimensions.
        words: the written words, singular, lower case, without counts.
        is_claim: the text says more than a unit, such as "or more".
        count: the number of "million" or "dozen", which belongs to the value.
    """

    dimensions: tuple[tuple[str, int], ...] | None
    factor: Fraction
    words: frozenset[str]
    is_claim: bool
    count: Fraction = Fraction(1)


def is_unit_word(word: str) -> bool:
    """Whether a bare word after a number is a unit. A single letter is a variable there."""
    return len(word) > 1 and any(word in table for table in (_WORDS, _BARE_PREFIXED, _POWERS, _MARKS))


@lru_cache(maxsize=4096)
def parse_unit(text: str) -> Unit:
    """The unit that the text after a value means."""
    text = _TEMPERATURE.sub(lambda match: "°" + match.group(1).upper(), _CJK_COUNT.sub(r"\1 ", text))
    dimensions: dict[str, int] = {}
    factor, count, words, known, sign, power = Fraction(1), Fraction(1), [], True, 1, 1
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
        if not entry[0]:
            count *= entry[1] ** sign
            words.pop()
        for name, exponent in entry[0].items():
            dimensions[name] = dimensions.get(name, 0) + sign * power * exponent
        factor *= entry[1] ** (sign * power) if entry[0] else 1
        power = 1
    is_claim = len(words) > 6 or any(word in CLAIMS or any(c.isdigit() for c in word) for word in words)
    is_claim = (is_claim and words != ["times"]) or text.strip() in ("squared", "cubed")
    stems = frozenset(_stem(word) for word in words)
    pairs = tuple(sorted((name, exponent) for name, exponent in dimensions.items() if exponent))
    return Unit(pairs if known else None, factor if known else Fraction(1), stems, is_claim, count)


_STERLING = (("gbp", 1),)  # "pounds" are a mass, except next to a £


def _stem(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def units_agree(gold: Unit, prediction: Unit) -> bool:
    """Whether two written units may be the same; known ones must have equal dimensions."""
    if gold.dimensions is not None and prediction.dimensions is not None:
        is_money = _STERLING in (gold.dimensions, prediction.dimensions)
        if is_money and (gold.words == {"pound"} or prediction.words == {"pound"}):
            return True
        return gold.dimensions == prediction.dimensions
    if not gold.words or not prediction.words:
        return True
    return gold.words <= prediction.words or prediction.words <= gold.words
