"""A small English grammar and its Spanish translation: the sentences that the reference is trained and judged on.

A rule is a list of alternatives, each one `English = Spanish`; in an alternative `<name>` stands for another rule and
anything else is a spoken word. The n-th `<name>` on the left is translated by the n-th on the right. Text is lower case
without punctuation, and numbers are spelled. No Spanish word or phrase stands for two English ones, so that a
translation has one right answer.

Spanish words agree: `@` is written o or a, `el@` and `un@` become articles, after the gender of the nearest noun
before them in their alternative, or else the nearest after them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from random import Random

LANGUAGES = ("en", "es")

_HELD_OUT_IN = 10  # one sentence in ten of each language is never trained on

# Pairs of words; `_` is a space inside one of them, `:f` and `:m` the gender of a Spanish noun.
_WORD_LISTS: dict[str, str] = {
    "digit": "zero=cero one=uno two=dos three=tres four=cuatro five=cinco six=seis seven=siete eight=ocho nine=nueve",
    "ten": "ten=diez twenty=veinte thirty=treinta hundred=cien",
    "weekday": "monday=lunes tuesday=martes wednesday=miércoles thursday=jueves friday=viernes saturday=sábado sunday=domingo",
    "name": "peter=pedro george=jorge henry=enrique william=guillermo john=juan mary=maría",
    "quality": (
        "red=roj@ green=verde blue=azul yellow=amarill@ black=negr@ brown=marrón small=pequeñ@ large=grande old=viej@ "
        "strong=fuerte"
    ),
    "mood": "happy=feliz sad=triste tired=cansad@ angry=furios@ hungry=hambrient@",
    "animal": (
        "dog=perro:m cat=gato:m horse=caballo:m rabbit=conejo:m bird=pájaro:m monkey=mono:m turtle=tortuga:f wolf=lobo:m "
        "cow=vaca:f spider=araña:f"
    ),
    "person": (
        "doctor=médico:m teacher=maestra:f farmer=granjero:m baker=panadera:f nurse=enfermera:f brother=hermano:m "
        "mother=madre:f soldier=soldado:m"
    ),
    "thing": (
        "book=libro:m letter=carta:f table=mesa:f window=ventana:f door=puerta:f bottle=botella:f hammer=martillo:m "
        "blanket=manta:f mirror=espejo:m clock=reloj:m bicycle=bicicleta:f umbrella=paraguas:m candle=vela:f basket=cesta:f"
    ),
    "food": (
        "bread=pan cheese=queso apples=manzanas potatoes=patatas rice=arroz chicken=pollo soup=sopa coffee=café sugar=azúcar "
        "honey=miel"
    ),
    "site": (
        "river=río:m mountain=montaña:f forest=bosque:m village=pueblo:m station=estación:f market=mercado:m bridge=puente:m "
        "island=isla:f castle=castillo:m church=iglesia:f school=escuela:f beach=playa:f"
    ),
    "handled": (
        "found=encontró carried=llevó painted=pintó bought=compró sold=vendió lost=perdió opened=abrió washed=lavó watched=miró"
    ),
    "moved": "walked=caminó ran=corrió returned=regresó travelled=viajó",
    "direction": "to=hasta from=desde behind=tras",
    "often": "always=siempre never=nunca",
    "soon": "today=hoy yesterday=ayer",
    "link": "because=porque but=pero when=cuando",
    "answer": "yes=sí no=no hello=hola goodbye=adiós",
}


def _again(name: str, *, english: str = "", spanish: str = "") -> list[str]:
    """Return a list's words each said twice, perhaps with another between them."""
    pairs = (pair.split(":")[0].split("=") for pair in _WORD_LISTS[name].split())
    return [f"{en}{english} {en} = {es}{spanish} {es}" for en, es in pairs]


_RULES: dict[str, list[str]] = {
    "who": ["<name> = <name>", "the <person> = el@ <person>"],
    "what": ["the <thing> = el@ <thing>", "the <thing> = el@ <thing>", "a <thing> = un@ <thing>"],
    "beast": ["the <animal> = el@ <animal>", "the <animal> = el@ <animal>", "a <animal> = un@ <animal>"],
    "spot": ["the <site> = el@ <site>"],
    "code": [
        "<digit> <digit> = <digit> <digit>",
        "<digit> <digit> <digit> = <digit> <digit> <digit>",
        "<digit> <digit> <digit> <digit> = <digit> <digit> <digit> <digit>",
        "<digit> <ten> <digit> = <digit> <ten> <digit>",
    ],
    "story": [
        "<who> <handled> <what> = <who> <handled> <what>",
        "<who> <handled> <beast> = <who> <handled> <beast>",
        "<who> <often> <handled> <what> = <who> <often> <handled> <what>",
        "<soon> <who> <handled> <what> = <soon> <who> <handled> <what>",
        "<who> <handled> <what> in <spot> = <who> <handled> <what> en <spot>",
        "<who> <moved> <direction> <spot> = <who> <moved> <direction> <spot>",
        "<who> <moved> from <spot> to <spot> = <who> <moved> desde <spot> hasta <spot>",
        "<beast> <moved> <direction> <spot> = <beast> <moved> <direction> <spot>",
        "<who> ate <food> with <food> = <who> comió <food> con <food>",
        "<who> bought <food> and <food> = <who> compró <food> y <food>",
        "<who> was <mood> = <who> estaba <mood>",
        "<beast> was <mood> and <quality> = <beast> estaba <mood> y <quality>",
        "<name> was <mood> <link> <name> <moved> = <name> estaba <mood> <link> <name> <moved>",
        "<name> <handled> <food> <link> <name> was <mood> = <name> <handled> <food> <link> <name> estaba <mood>",
    ],
    "fact": [
        "<what> is <quality> = <what> es <quality>",
        "<what> is <quality> and <quality> = <what> es <quality> y <quality>",
        "<beast> is <quality> = <beast> es <quality>",
        "<beast> is very <quality> = <beast> es muy <quality>",
        "<what> is in <spot> = <what> está en <spot>",
        "the number is <code> = el número es <code>",
        "<weekday> <code> = <weekday> <code>",
        "where is <what> = dónde está <what>",
        "<answer> <what> is <quality> = <answer> <what> es <quality>",
        "<answer> <name> = <answer> <name>",
    ],
    "fragment": [
        "<code> = <code>",
        "<code> = <code>",
        "<weekday> <digit> = <weekday> <digit>",
        "<answer> <name> = <answer> <name>",
        "<name> and <name> = <name> y <name>",
        "<food> and <food> = <food> y <food>",
        "<quality> and <quality> = <quality> y <quality>",
        "<spot> = <spot>",
        "<who> <moved> = <who> <moved>",
        "<soon> <who> <moved> = <soon> <who> <moved>",
    ],
    "single": ["<word> = <word>"],
    # Any words in any order: nothing but listening helps there.
    "shuffled": [f"{'<word> ' * count}= {'<word> ' * count}".strip() for count in (2, 2, 3, 3, 4, 5)],
    # The same word twice in a row: what follows the one follows the other too.
    "twice": _again("digit"),
    "both": [pair for name in ("food", "quality", "name") for pair in _again(name, english=" and", spanish=" y")],
    "repeated": [
        *("<twice> = <twice>", "<twice> <digit> = <twice> <digit>", "<digit> <twice> = <digit> <twice>"),
        *("<digit> <twice> <digit> = <digit> <twice> <digit>", "<weekday> <digit> <twice> = <weekday> <digit> <twice>"),
        *("the number is <digit> <twice> = el número es <digit> <twice>", "<twice> <twice> = <twice> <twice>"),
        *("<both> = <both>", "<what> is <both> = <what> es <both>", "<who> bought <both> = <who> compró <both>"),
        *("<digit> <ten> <digit> <ten> = <digit> <ten> <digit> <ten>", "<digit> <digit> <twice> = <digit> <digit> <twice>"),
    ],
    "sentence": [f"<{rule}> = <{rule}>" for rule in ("story", "story", "story", "fact", "fact", "fragment")],
}
# Words of the rules, which are learned alone and in any order too.
_FUNCTION_WORDS = [
    *("the = el", "the = la", "a = una", "and = y", "in = en", "with = con", "is = es", "was = estaba", "ate = comió"),
    *("very = muy", "where = dónde", "number = número"),
]


@dataclass(frozen=True)
class Word:
    """A spoken word; words of both languages with one `piece` translate each other, a negative one nothing in particular."""

    text: str
    piece: int
    gender: str = ""  # "m" or "f", of a Spanish noun


@dataclass(frozen=True)
class Sentence:
    """What one language says, as words."""

    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """The words with spaces between them."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True)
class Pair:
    """A sentence in both languages."""

    en: Sentence
    es: Sentence

    def __getitem__(self, language: str) -> Sentence:
        return self.en if language == "en" else self.es


@dataclass(frozen=True)
class _Alternative:
    en: tuple[str, ...]
    es: tuple[str, ...]


def words(language: str) -> list[str]:
    """Return every word that the grammar can speak in a language, sorted."""
    random, found = Random(0), set[str]()
    for rule, alternatives in _rules().items():
        for index in range(len(alternatives)):
            for _ in range(4):  # both genders of the words that agree
                found.update(_pair(random, rule, index)[language].text.split())
    return sorted(found)


def sentence(random: Random, rule: str = "sentence") -> Pair:
    """Return one random sentence of a rule in both languages, whether held out or not."""
    return _pair(random, rule, random.randrange(len(_rules()[rule])))


def is_held_out(text: str) -> bool:
    """Say whether a sentence belongs to the tenth that training never sees."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_IN == 0


def draw(random: Random, rule: str = "sentence", *, held_out: bool = False) -> Pair:
    """Return one random sentence which is held out in both languages, or in none."""
    while True:
        pair = sentence(random, rule)
        if is_held_out(pair.en.text) == is_held_out(pair.es.text) == held_out:
            return pair


@cache
def _rules() -> dict[str, tuple[_Alternative, ...]]:
    lists = {name: [f"{pair}".replace("=", " = ") for pair in pairs.split()] for name, pairs in _WORD_LISTS.items()}
    plain = [pair for pairs in lists.values() for pair in pairs]
    merged = {**lists, **_RULES, "word": plain + _FUNCTION_WORDS}
    return {name: tuple(_alternative(line) for line in lines) for name, lines in merged.items()}


def _alternative(line: str) -> _Alternative:
    english, spanish = line.split(" = ")
    return _Alternative(tuple(english.split()), tuple(spanish.split()))


def _pair(random: Random, rule: str, index: int) -> Pair:
    pair = _expand(random, rule, count(), index)
    return Pair(pair.en, Sentence(tuple(_contracted(_agreed(pair.es.words, final=True)))))


def _expand(random: Random, rule: str, pieces: "count[int]", index: int | None = None) -> Pair:
    alternatives = _rules()[rule]
    alternative = alternatives[random.randrange(len(alternatives)) if index is None else index]
    # A list's item is one piece; the words around the slots of a rule belong to the whole sentence.
    piece = next(pieces) if rule in _WORD_LISTS or rule == "word" else -1
    slots: dict[str, list[Pair]] = {}
    english: list[Word] = []
    for token in alternative.en:
        if token.startswith("<"):
            pair = _expand(random, token[1:-1], pieces)
            slots.setdefault(token, []).append(pair)
            english += pair.en.words
        else:
            english += _words(token, piece)
    spanish: list[Word] = []
    for token in alternative.es:
        spanish += slots[token].pop(0).es.words if token.startswith("<") else _words(token, piece)
    return Pair(Sentence(tuple(english)), Sentence(_agreed(spanish)))


def _words(token: str, piece: int) -> Iterator[Word]:
    text, _, gender = token.partition(":")
    return (Word(part, piece, gender) for part in text.split("_"))


def _agreed(spoken: "list[Word] | tuple[Word, ...]", *, final: bool = False) -> tuple[Word, ...]:
    """Return the words with `@` resolved where a noun decides it; what is left at the end is masculine."""
    nouns = [(place, word.gender) for place, word in enumerate(spoken) if word.gender]
    if not nouns and not final:
        return tuple(spoken)
    agreed = []
    for place, word in enumerate(spoken):
        before = [gender for noun, gender in nouns if noun < place]
        after = [gender for noun, gender in nouns if noun > place]
        gender = before[-1] if before else after[0] if after else "m"
        agreed.append(replace(word, text=_inflected(word.text, gender)))
    return tuple(agreed)


def _inflected(text: str, gender: str) -> str:
    articles = {"el@": ("el", "la"), "un@": ("un", "una")}
    if text in articles:
        return articles[text][gender == "f"]
    return text.replace("@", "a" if gender == "f" else "o")


def _contracted(spoken: tuple[Word, ...]) -> Iterator[Word]:
    """Yield the words with `a el` as `al` and `de el` as `del`."""
    rest = list(spoken)
    while rest:
        word = rest.pop(0)
        if word.text in {"a", "de"} and rest and rest[0].text == "el":
            word = replace(word, text=word.text + "l" if word.text == "a" else "del")
            rest.pop(0)
        yield word
