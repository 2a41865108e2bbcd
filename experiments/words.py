"""Words and noise that questions are made of."""

import numpy as np

from framework.errors import KvtwinError

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
ADJECTIVES = (
    "able bold brave brief bright brisk broad calm clean clear cold cosy crisp curly deep eager early easy fair fancy "
    "fast firm fresh gentle glad golden grand great green happy hardy honest humble icy jolly keen kind large lively "
    "loyal lucky merry mild modest neat nimble noble odd pale plain polite proud quick quiet rapid rare ready red rich "
    "ripe round royal rustic sandy sharp shiny short shy silent silver simple sleek slim slow small smooth soft solid "
    "spare steady stern still strong sturdy subtle sunny sweet swift tall tame tender thin tidy tiny vast vivid warm "
    "wide wild wise witty young"
).split()
NOUNS = (
    "acorn anchor apple arrow badger barrel basket beacon bell bench berry bird boat bottle branch bridge brook button "
    "cabin candle castle cedar chair cherry circle clock cloud clover coast comet copper coral corner cottage crane "
    "creek dagger daisy desert drum eagle ember falcon feather fern field flame flute forest fountain fox garden gate "
    "glacier grove hammer harbor hazel heron hill island ivy jacket kettle ladder lantern lemon lily lion maple "
    "marble meadow mirror moon mountain needle oak ocean orchard otter owl paddle pebble pepper pine planet pocket "
    "pond rabbit raven river robin rocket rose saddle salmon shell ship sparrow spoon spring star stone storm stream "
    "table temple thistle thunder tiger tower trumpet tulip tunnel valley violin wagon walnut whale willow "
    "window winter wolf"
).split()
# Without those that another one contains.
PLAIN = [
    word
    for word in ADJECTIVES + NOUNS
    if not any(word != other and word in other for other in ADJECTIVES + NOUNS)
]
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


def noise(count: int, first: int = 0) -> list[str]:
    """So many sentences of RULER's noise, in turns from the `first` on. RULER repeats all five as one line; a sentence
    a line lets short contexts be filled as well."""
    return [NOISE[number % len(NOISE)] for number in range(first, first + count)]


def pairs_of_words(random: np.random.Generator, count: int) -> list[str]:
    """Different words of the form adjective-noun."""
    places = random.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
    return [f"{ADJECTIVES[place // len(NOUNS)]}-{NOUNS[place % len(NOUNS)]}" for place in places]


def plain_words(random: np.random.Generator, count: int) -> list[str]:
    """Different words: adjectives and nouns, and where these are too few, pairs of them among the others."""
    every = PLAIN + pairs_of_words(random, max(count - len(PLAIN), 0))
    return [every[place] for place in random.choice(len(every), count, replace=False)]


def numbers(random: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    """Different numbers of so many digits."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[str(random.integers(10 ** (digits - 1), 10**digits))] = None
    return list(found)


def uuids(random: np.random.Generator, count: int) -> list[str]:
    """Version 4 UUIDs, from 128 random bits each."""
    from uuid import UUID

    return [str(UUID(bytes=random.bytes(16), version=4)) for _ in range(count)]


def letters(random: np.random.Generator, count: int, width: int) -> list[str]:
    """Different strings of lower-case letters."""
    if count > LETTERS.size**width:
        raise KvtwinError(f"{count} different words of {width} letters; there are {LETTERS.size**width}")
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice(LETTERS, width))] = None
    return list(found)
