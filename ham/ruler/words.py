"""Words and UUIDs of needles: finite lists, so that each is encoded once.

The published keys are adjective and noun of the word lists of the package wonderwords; these are
lists of our own, of common words, so that a sample depends on nothing but this project. The
published UUIDs are drawn from all of them, these from 8,192.
"""

from __future__ import annotations

import functools
import hashlib
import uuid

# fmt: off
ADJECTIVES = (
    "able", "ample", "ancient", "angry", "awake", "bitter", "blank", "blind", "bold", "brave",
    "brief", "bright", "brisk", "broad", "busy", "calm", "careful", "careless", "cautious",
    "cheap", "cheerful", "civil", "clean", "clever", "cloudy", "clumsy", "cold", "common",
    "cool", "crisp", "crooked", "cruel", "curious", "damp", "daring", "dark", "dear", "deep",
    "dim", "distant", "dry", "dull", "dusty", "eager", "early", "easy", "empty", "equal", "exact",
    "faint", "fair", "faithful", "famous", "fancy", "fast", "fierce", "final", "firm", "flat",
    "foolish", "fresh", "friendly", "gentle", "giant", "glad", "golden", "grand", "grateful",
    "grave", "greedy", "handsome", "happy", "harsh", "hasty", "heavy", "hidden", "hollow",
    "honest", "humble", "idle", "jolly", "keen", "kind", "large", "late", "lazy", "lively",
    "lonely", "loud", "loyal", "merry", "mighty", "mild", "modest", "narrow", "neat", "noble",
    "odd", "patient", "plain", "pleasant", "polite", "proud", "quick", "quiet", "rapid", "rare",
    "ready", "restless", "rough", "round", "rude", "sharp", "silent", "slender", "slow", "smooth",
    "sober", "solid", "steady", "strange", "sturdy", "sudden", "tender", "tidy", "vast", "warm",
    "wise",
)
NOUNS = (
    "acorn", "anchor", "apple", "apron", "arrow", "badge", "barley", "barrel", "basket", "beacon",
    "bell", "bench", "bishop", "blanket", "bonnet", "bottle", "branch", "bridge", "brook",
    "bucket", "button", "cabin", "candle", "captain", "carpet", "castle", "cattle", "chapel",
    "cheese", "cherry", "chimney", "clock", "cloud", "coach", "coin", "copper", "cottage",
    "cradle", "crown", "curtain", "dagger", "dancer", "desk", "doctor", "dragon", "drum", "eagle",
    "engine", "farmer", "feather", "fiddle", "flute", "forest", "fountain", "fox", "garden",
    "garment", "gate", "glove", "goose", "grape", "hammer", "harbour", "harp", "helmet", "hill",
    "honey", "horse", "island", "ivory", "jacket", "jewel", "judge", "kettle", "kitchen",
    "ladder", "lamp", "lantern", "lemon", "letter", "lion", "locket", "market", "meadow",
    "merchant", "mill", "mirror", "monk", "mountain", "needle", "oak", "orchard", "oven", "owl",
    "painter", "palace", "parcel", "pearl", "pepper", "pigeon", "pillow", "pirate", "pocket",
    "prince", "quarry", "rabbit", "ribbon", "river", "sailor", "saddle", "servant", "shepherd",
    "shovel", "silver", "spade", "spider", "statue", "stove", "sword", "teapot", "temple",
    "tower", "trumpet", "tunnel", "valley", "violin", "wagon", "whistle",
)
# fmt: on

WORD_COUNT = len(ADJECTIVES) * len(NOUNS)
UUID_COUNT = 8192


def word(number: int) -> str:
    """Word 0..WORD_COUNT - 1: every adjective with every noun, as `adjective-noun`."""
    adjective, noun = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


@functools.lru_cache(maxsize=UUID_COUNT)
def uuid_text(number: int) -> str:
    """UUID 0..UUID_COUNT - 1, of version 4 as the published ones."""
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()
    return str(uuid.UUID(bytes=digest, version=4))
