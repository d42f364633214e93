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
    "unit": "two=dos three=tres four=cuatro five=cinco six=seis seven=siete eight=ocho nine=nueve",
    "teen": (
        "ten=diez eleven=once twelve=doce thirteen=trece fourteen=catorce fifteen=quince sixteen=dieciséis "
        "seventeen=diecisiete eighteen=dieciocho nineteen=diecinueve"
    ),
    "twenty": (
        "twenty=veinte twenty_two=veintidós twenty_three=veintitrés twenty_four=veinticuatro twenty_five=veinticinco "
        "twenty_six=veintiséis twenty_seven=veintisiete twenty_eight=veintiocho twenty_nine=veintinueve"
    ),
    "ten": "thirty=treinta forty=cuarenta fifty=cincuenta sixty=sesenta seventy=setenta eighty=ochenta ninety=noventa",
    "hundred": (
        "two_hundred=doscientos three_hundred=trescientos four_hundred=cuatrocientos five_hundred=quinientos "
        "six_hundred=seiscientos seven_hundred=setecientos eight_hundred=ochocientos nine_hundred=novecientos"
    ),
    "hour": (
        "one=la_una two=las_dos three=las_tres four=las_cuatro five=las_cinco six=las_seis seven=las_siete "
        "eight=las_ocho nine=las_nueve ten=las_diez eleven=las_once twelve=las_doce"
    ),
    "day": (
        "first=uno second=dos third=tres fourth=cuatro fifth=cinco sixth=seis seventh=siete eighth=ocho ninth=nueve "
        "tenth=diez eleventh=once twelfth=doce thirteenth=trece fourteenth=catorce fifteenth=quince "
        "sixteenth=dieciséis seventeenth=diecisiete eighteenth=dieciocho nineteenth=diecinueve twentieth=veinte "
        "twenty_first=veintiuno twenty_second=veintidós twenty_third=veintitrés twenty_fourth=veinticuatro "
        "twenty_fifth=veinticinco thirtieth=treinta"
    ),
    "month": (
        "january=enero february=febrero march=marzo april=abril may=mayo june=junio july=julio august=agosto "
        "september=septiembre october=octubre november=noviembre december=diciembre"
    ),
    "weekday": ("monday=lunes tuesday=martes wednesday=miércoles thursday=jueves friday=viernes saturday=sábado sunday=domingo"),
    "name": (
        "anna=ana:f bruno=bruno:m carla=carla:f daniel=daniel:m emma=emma:f felix=félix:m elena=elena:f henry=enrique:m "
        "iris=iris:f jacob=jacobo:m karen=karen:f lucas=lucas:m maria=maría:f nina=nina:f oscar=óscar:m peter=pedro:m "
        "rosa=rosa:f simon=simón:m tina=tina:f victor=víctor:m walter=walter:m sarah=sara:f laura=laura:f martin=martín:m "
        "alice=alicia:f george=jorge:m helen=helena:f thomas=tomás:m"
    ),
    "place": (
        "london=londres paris=parís berlin=berlín madrid=madrid vienna=viena boston=boston chicago=chicago dublin=dublín "
        "lisbon=lisboa oslo=oslo tokyo=tokio lima=lima bogota=bogotá toronto=toronto denver=denver dallas=dallas "
        "geneva=ginebra athens=atenas"
    ),
    "room": (
        "kitchen=cocina:f bedroom=dormitorio:m bathroom=baño:m garage=garaje:m office=oficina:f hall=pasillo:m "
        "garden=jardín:m cellar=sótano:m attic=ático:m"
    ),
    "device": (
        "lamp=lámpara:f heater=calentador:m fan=ventilador:m television=televisor:m radio=radio:f oven=horno:m "
        "computer=ordenador:m camera=cámara:f alarm=alarma:f printer=impresora:f"
    ),
    "colour": (
        "green=verde yellow=amarill@ grey=gris purple=morad@ black=negr@ white=blanc@ brown=marrón silver=platead@ "
        "golden=dorad@ pink=rosad@"
    ),
    "animal": (
        "dog=perro:m cat=gato:m horse=caballo:m rabbit=conejo:m bird=pájaro:m fox=zorro:m lion=león:m tiger=tigre:m "
        "elephant=elefante:m monkey=mono:m turtle=tortuga:f wolf=lobo:m"
    ),
    "person": (
        "teacher=maestra:f doctor=médico:m farmer=granjero:m pilot=piloto:m sailor=marinero:m driver=conductora:f "
        "baker=panadera:f singer=cantante:f lawyer=abogado:m nurse=enfermera:f soldier=soldado:m painter=pintora:f "
        "captain=capitán:m student=estudiante:m neighbour=vecino:m brother=hermano:m sister=hermana:f mother=madre:f "
        "father=padre:m"
    ),
    "people": (
        "teachers=maestras doctors=médicos farmers=granjeros sailors=marineros students=estudiantes soldiers=soldados "
        "neighbours=vecinos nurses=enfermeras"
    ),
    "thing": (
        "book=libro:m letter=carta:f table=mesa:f window=ventana:f door=puerta:f basket=cesta:f bottle=botella:f "
        "hammer=martillo:m blanket=manta:f mirror=espejo:m guitar=guitarra:f piano=piano:m clock=reloj:m "
        "picture=cuadro:m ticket=billete:m bicycle=bicicleta:f wallet=cartera:f umbrella=paraguas:m candle=vela:f "
        "ladder=escalera:f"
    ),
    "food": (
        "bread=pan butter=mantequilla cheese=queso apples=manzanas potatoes=patatas rice=arroz chicken=pollo soup=sopa "
        "salad=ensalada coffee=café sugar=azúcar pepper=pimienta honey=miel tomatoes=tomates lemons=limones "
        "chocolate=chocolate"
    ),
    "site": (
        "river=río:m mountain=montaña:f forest=bosque:m village=pueblo:m station=estación:f market=mercado:m "
        "bridge=puente:m harbour=puerto:m island=isla:f castle=castillo:m museum=museo:m library=biblioteca:f "
        "church=iglesia:f hospital=hospital:m airport=aeropuerto:m school=escuela:f beach=playa:f valley=valle:m "
        "desert=desierto:m theatre=teatro:m"
    ),
    "size": (
        "small=pequeñ@ large=grande old=viej@ young=joven tall=alt@ heavy=pesad@ strange=extrañ@ quiet=callad@ "
        "lonely=solitari@ clever=inteligente famous=famos@"
    ),
    "mood": (
        "happy=content@ angry=enfadad@ tired=cansad@ hungry=hambrient@ afraid=asustad@ ready=list@ proud=orgullos@ "
        "lucky=afortunad@ careful=prudente curious=curios@"
    ),
    "weather": (
        "sunny=soleado cloudy=nublado rainy=lluvioso windy=ventoso stormy=tormentoso foggy=brumoso warm=cálido cold=frío"
    ),
    "moved": (
        "walked=caminó ran=corrió travelled=viajó returned=regresó drove=condujo climbed=subió hurried=se_apresuró wandered=vagó"
    ),
    "moved_together": (
        "walked=caminaron ran=corrieron travelled=viajaron returned=regresaron drove=condujeron climbed=subieron "
        "hurried=se_apresuraron wandered=vagaron"
    ),
    "handled": (
        "found=encontró carried=llevó painted=pintó bought=compró sold=vendió lost=perdió opened=abrió repaired=reparó "
        "washed=lavó dropped=soltó"
    ),
    "met": (
        "followed=siguió watched=miró helped=ayudó visited=visitó remembered=recordó invited=invitó called=llamó greeted=saludó"
    ),
    "daypart": "morning=mañana:f afternoon=tarde:f evening=noche:f",
    "greeting": "good_morning=buenos_días good_afternoon=buenas_tardes good_evening=buenas_noches",
    "soon": "today=hoy tonight=esta_noche tomorrow=mañana",
    "often": "always=siempre never=nunca often=a_menudo sometimes=a_veces usually=normalmente",
    "manner": "slowly=despacio quickly=rápidamente quietly=silenciosamente suddenly=de_repente carefully=cuidadosamente",
    "media": ("music=la_música news=las_noticias song=la_canción film=la_película story=la_historia message=el_mensaje"),
    "currency": "dollars=dólares euros=euros pesos=pesos",
    "measure": "metres=metros kilometres=kilómetros steps=pasos",
    "span": "minutes=minutos:m hours=horas:f days=días:m weeks=semanas:f months=meses:m years=años:m",
    "link": "because=porque although=aunque while=mientras when=cuando but=pero",
    "side": "left=a_la_izquierda right=a_la_derecha north=al_norte south=al_sur east=al_este west=al_oeste",
}

_RULES: dict[str, list[str]] = {
    "under_hundred": ["<unit> = <unit>", "<teen> = <teen>", "<twenty> = <twenty>", "<ten> = <ten>"]
    + ["<ten> <unit> = <ten> y <unit>"] * 2,
    "number": [
        "<under_hundred> = <under_hundred>",
        "<under_hundred> = <under_hundred>",
        "<hundred> = <hundred>",
        "<hundred> and <under_hundred> = <hundred> <under_hundred>",
        "<under_hundred> thousand = <under_hundred> mil",
        "<unit> thousand <hundred> = <unit> mil <hundred>",
    ],
    "date": [
        "the <day> of <month> = el <day> de <month>",
        "<weekday> the <day> of <month> = <weekday> <day> de <month>",
        "the <day> of <month> twenty <teen> = el <day> de <month> de dos mil <teen>",
    ],
    "clock": [
        "<hour> thirty = <hour> y treinta",
        "<hour> fifteen = <hour> y quince",
        "<hour> forty five = <hour> y cuarenta y cinco",
        "half past <hour> = <hour> y media",
        "quarter past <hour> = <hour> y cuarto",
        "quarter to <hour> = <hour> menos cuarto",
        "<hour> in the <daypart> = <hour> de la <daypart>",
    ],
    "code": [
        "<digit> <digit> <digit> = <digit> <digit> <digit>",
        "<digit> <digit> <digit> <digit> = <digit> <digit> <digit> <digit>",
        "<digit> <digit> <digit> <digit> <digit> <digit> = <digit> <digit> <digit> <digit> <digit> <digit>",
    ],
    "who": [
        "<name> = <name>",
        "<name> = <name>",
        "the <person> = el@ <person>",
        "the <size> <person> = el@ <person> <size>",
        "my <person> = mi <person>",
    ],
    "what": [
        "the <thing> = el@ <thing>",
        "a <colour> <thing> = un@ <thing> <colour>",
        "the <size> <thing> = el@ <thing> <size>",
        "the <colour> <thing> = el@ <thing> <colour>",
    ],
    "beast": [
        "the <animal> = el@ <animal>",
        "a <colour> <animal> = un@ <animal> <colour>",
        "the <size> <animal> = el@ <animal> <size>",
    ],
    "spot": ["the <site> = el@ <site>"],
    "space": ["the <room> = el@ <room>"],
    "machine": ["the <device> = el@ <device>"],
    "where": [
        "to <spot> = hasta <spot>",
        "across <spot> = a través de <spot>",
        "near <spot> = cerca de <spot>",
        "behind <spot> = detrás de <spot>",
        "through <spot> = por <spot>",
        "from <spot> to <spot> = desde <spot> hasta <spot>",
        "to <place> = a <place>",
        "from <place> to <place> = de <place> a <place>",
    ],
    "command": [
        "turn on <machine> = enciende <machine>",
        "turn off <machine> = apaga <machine>",
        "turn on <machine> in <space> = enciende <machine> en <space>",
        "turn off <machine> in <space> = apaga <machine> en <space>",
        "please repair <machine> in <space> = por favor repara <machine> en <space>",
        "set <machine> to <under_hundred> = pon <machine> a <under_hundred>",
        "set the temperature in <space> to <under_hundred> degrees = pon la temperatura en <space> a <under_hundred> grados",
        "set a timer for <under_hundred> <span> = pon un temporizador de <under_hundred> <span>",
        "set an alarm for <clock> = pon una alarma a <clock>",
        "wake me up at <clock> = despiértame a <clock>",
        "play the <media> in <space> = reproduce <media> en <space>",
        "stop the <media> = detén <media>",
        "call <name> = llama a <name>",
        "call <name> at <clock> = llama a <name> a <clock>",
        "send a message to <name> = envía un mensaje a <name>",
        "remind me to call <name> on <weekday> = recuérdame llamar a <name> el <weekday>",
        "remind me to buy <food> <soon> = recuérdame comprar <food> <soon>",
        "open the door of <space> = abre la puerta de <space>",
        "close the window of <space> = cierra la ventana de <space>",
        "add <food> and <food> to the list = añade <food> y <food> a la lista",
        "show me the news from <place> = muéstrame las noticias de <place>",
        "book a table for <unit> at <clock> = reserva una mesa para <unit> a <clock>",
        "turn <side> at <spot> = gira <side> en <spot>",
        "delete message number <under_hundred> = borra el mensaje número <under_hundred>",
        "cancel my meeting with <name> on <weekday> = cancela mi reunión con <name> el <weekday>",
    ],
    "fact": [
        "the weather in <place> is <weather> = el tiempo en <place> es <weather>",
        "the weather <soon> will be <weather> and <weather> = el tiempo <soon> será <weather> y <weather>",
        "it will be <weather> in <place> on <weekday> = estará <weather> en <place> el <weekday>",
        "the train to <place> leaves at <clock> = el tren a <place> sale a <clock>",
        "the next flight from <place> to <place> leaves on <weekday> = el próximo vuelo de <place> a <place> sale el <weekday>",
        "<what> costs <number> <currency> = <what> cuesta <number> <currency>",
        "<name> paid <number> <currency> for <what> = <name> pagó <number> <currency> por <what>",
        "<spot> is <number> <measure> from here = <spot> está a <number> <measure> de aquí",
        "the meeting with <name> is on <date> = la reunión con <name> es <date>",
        "today is <date> = hoy es <date>",
        "<name> was born on <date> = <name> nació <date>",
        "the number is <code> = el número es <code>",
        "the code for <space> is <code> = el código de <space> es <code>",
        "my phone number is <code> = mi teléfono es <code>",
        "the answer is <number> = la respuesta es <number>",
        "we waited <under_hundred> <span> in <spot> = esperamos <under_hundred> <span> en <spot>",
        "<spot> opens at <clock> = <spot> abre a <clock>",
        "there are <under_hundred> <people> in <spot> = hay <under_hundred> <people> en <spot>",
    ],
    "story": [
        "<who> <moved> <where> = <who> <moved> <where>",
        "<who> <manner> <moved> <where> = <who> <manner> <moved> <where>",
        "<who> <handled> <what> = <who> <handled> <what>",
        "<who> <handled> <what> near <spot> = <who> <handled> <what> cerca de <spot>",
        "<who> <handled> <what> and <moved> <where> = <who> <handled> <what> y <moved> <where>",
        "<who> <met> <who> = <who> <met> a <who>",
        "<who> <met> <beast> = <who> <met> a <beast>",
        "<who> <often> <met> <who> in the <daypart> = <who> <often> <met> a <who> por la <daypart>",
        "<beast> <moved> <where> = <beast> <moved> <where>",
        "<beast> was <mood> = <beast> estaba <mood>",
        "<who> was <mood> and <mood> = <who> estaba <mood> y <mood>",
        "<who> was <mood> <link> <who> <handled> <what> = <who> estaba <mood> <link> <who> <handled> <what>",
        "<who> <moved> <where> <link> it was <weather> = <who> <moved> <where> <link> hacía tiempo <weather>",
        "<who> and <who> <moved_together> <where> on <weekday> = <who> y <who> <moved_together> <where> el <weekday>",
        "in the <daypart> <who> <handled> <what> = por la <daypart> <who> <handled> <what>",
        "one <daypart> in <month> <who> <met> <who> = una <daypart> de <month> <who> <met> a <who>",
        "<manner> <who> <handled> <what> in <spot> = <manner> <who> <handled> <what> en <spot>",
        "<who> wanted to eat <food> and <food> = <who> quería comer <food> y <food>",
        "<who> had <food> with <food> in <place> = <who> tomó <food> con <food> en <place>",
        "<soon> <who> will travel <where> = <soon> <who> viajará <where>",
        "many <span> later <who> <moved> <where> = much@s <span> después <who> <moved> <where>",
        "<name> told <name> a story about <beast> = <name> contó a <name> una historia sobre <beast>",
        "<who> said that <who> was <mood> = <who> dijo que <who> estaba <mood>",
        "<who> <handled> <what> <link> <who> <moved> <where> = <who> <handled> <what> <link> <who> <moved> <where>",
        "where is <what> = dónde está <what>",
        "why was <who> so <mood> = por qué estaba <who> tan <mood>",
        "how many <span> will <who> stay in <place> = cuánt@s <span> estará <who> en <place>",
        "when does the train to <place> leave = cuándo sale el tren a <place>",
    ],
    "fragment": [
        "<name> = <name>",
        "<place> = <place>",
        "<number> = <number>",
        "<number> = <number>",
        "<weekday> = <weekday>",
        "<date> = <date>",
        "<clock> = <clock>",
        "yes = sí",
        "thank you = gracias",
        "<greeting> = <greeting>",
        "hello <name> = hola <name>",
        "goodbye <name> = adiós <name>",
        "<colour> <thing> = <thing> <colour>",
        "<size> <animal> = <animal> <size>",
        "<food> = <food>",
        "please help = por favor ayuda",
        "<soon> = <soon>",
        "<spot> = <spot>",
        "<who> = <who>",
    ],
    "short": ["<word> = <word>", "<word> <word> = <word> <word>", "<fragment> = <fragment>", "<fragment> = <fragment>"],
    "sentence": [f"<{rule}> = <{rule}>" for rule in ("command", "fact", "story", "story", "fragment")],
}
# Single words of lists in which a Spanish word means one thing, whatever the sentence.
_PLAIN_LISTS = (
    *("digit", "teen", "twenty", "ten", "hundred", "month", "weekday", "name", "place", "room", "device", "colour"),
    *("animal", "person", "people", "thing", "food", "site", "size", "mood", "weather", "moved", "handled", "met"),
    *("often", "manner", "media", "currency", "measure", "span", "link", "side"),
)


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
    plain = [pair for name in _PLAIN_LISTS for pair in lists[name]]
    merged = {**lists, **_RULES, "word": plain}
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
