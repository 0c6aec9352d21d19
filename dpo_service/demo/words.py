"""Vocabulary of the generated corpus. Lists only."""

from __future__ import annotations

_NOUNS = (
    "apple bell bench bottle bridge brush button candle carpet castle chair clock cloud cup desk door drum engine "
    "feather flag flower fork garden gate glove hammer hat hill horse house island jacket kettle key ladder lake lamp "
    "leaf letter mirror needle ocean pencil piano pillow plate river road roof ship shoe spoon stone table tent "
    "ticket tower train tree wagon wheel window"
)
_COLOURS = "red blue green yellow white black orange purple brown pink grey silver"
_NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karen Leo Maria Nils Olga Paul Rosa Simon Tina Victor Wendy "
    "Yusuf Zara Amir Bella Carlos Diana Erik Fatima Georg"
)
_JOBS = "baker doctor driver farmer lawyer nurse painter pilot sailor teacher tailor writer"
NOUNS = tuple(_NOUNS.split())
COLOURS = tuple(_COLOURS.split())
NAMES = tuple(_NAMES.split())
JOBS = tuple(_JOBS.split())
CAPITALS: dict[str, str] = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Canada": "Ottawa",
}
OPPOSITES: dict[str, str] = {
    "hot": "cold",
    "big": "small",
    "old": "young",
    "fast": "slow",
    "light": "heavy",
    "early": "late",
    "open": "closed",
    "full": "empty",
    "high": "low",
    "hard": "soft",
    "rich": "poor",
    "wet": "dry",
    "loud": "quiet",
    "sharp": "blunt",
    "wide": "narrow",
    "deep": "shallow",
}
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five")
