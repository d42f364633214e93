"""A small English grammar: the sentences that the reference is trained and judged on.

A rule is a list of alternatives; in an alternative `<name>` stands for another rule and anything
else is a spoken word. Text is lower case without punctuation, and numbers are spelled.
"""

import hashlib
from functools import cache
from random import Random

_HELD_OUT_IN = 10  # one sentence in ten is never trained on

_WORD_LISTS: dict[str, str] = {
    "digit": "zero one two three four five six seven eight nine",
    "unit": "one two three four five six seven eight nine",
    "teen": "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
    "ten": "twenty thirty forty fifty sixty seventy eighty ninety",
    "hour": "one two three four five six seven eight nine ten eleven twelve",
    "ordinal": (
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
        "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
    ),
    "month": ("january february march april may june july august september october november december"),
    "weekday": "monday tuesday wednesday thursday friday saturday sunday",
    "name": (
        "anna bruno carla daniel emma felix grace henry iris jacob karen lucas maria nina oscar "
        "peter rosa simon tina victor walter sarah laura martin alice george helen thomas"
    ),
    "place": (
        "london paris berlin madrid vienna boston chicago dublin lisbon oslo tokyo cairo sydney "
        "toronto denver dallas geneva athens"
    ),
    "room": "kitchen bedroom bathroom garage office hall garden cellar attic",
    "device": "lights heater fan television radio oven computer camera alarm printer",
    "colour": "green yellow orange purple black white brown silver golden pink",
    "animal": "dog cat horse rabbit bird fox lion tiger elephant monkey turtle wolf",
    "person": (
        "teacher doctor farmer pilot sailor driver baker singer lawyer nurse soldier painter "
        "captain student neighbour brother sister mother father"
    ),
    "thing": (
        "book letter table window door basket bottle hammer blanket mirror guitar piano clock "
        "picture ticket bicycle wallet umbrella candle ladder"
    ),
    "food": ("bread butter cheese apples potatoes rice chicken soup salad coffee sugar pepper honey tomatoes lemons chocolate"),
    "site": (
        "river mountain forest village station market bridge harbour island castle museum "
        "library church hospital airport school beach valley desert theatre"
    ),
    "size": "small large old young tall heavy strange quiet lonely broken clever famous",
    "mood": "happy angry tired hungry afraid ready proud lucky careful curious",
    "weather": "sunny cloudy rainy windy stormy foggy warm cold",
    "moved": "walked ran travelled returned drove climbed hurried wandered",
    "handled": "found carried painted bought sold lost opened repaired borrowed dropped",
    "met": "followed watched helped visited remembered invited called thanked",
    "when": "yesterday today tonight tomorrow",
    "daypart": "morning afternoon evening",
    "often": "always never often sometimes usually",
    "manner": "slowly quickly quietly suddenly carefully",
    "media": "music news song film story message",
    "currency": "dollars euros pounds",
    "measure": "metres miles kilograms gallons degrees",
    "span": "minutes hours days weeks months years",
    "link": "because although while before after until",
    "side": "left north south east west",
}

_RULES: dict[str, list[str]] = {
    "under_hundred": ["<unit>", "<teen>", "<ten>", "<ten> <unit>", "<ten> <unit>"],
    "number": [
        "<under_hundred>",
        "<under_hundred>",
        "<unit> hundred",
        "<unit> hundred and <under_hundred>",
        "<under_hundred> thousand",
        "<unit> thousand <unit> hundred",
    ],
    "day": ["<ordinal>", "<ordinal>", "twenty <ordinal_unit>", "thirtieth", "thirty first"],
    "ordinal_unit": ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"],
    "date": [
        "<month> the <day>",
        "the <day> of <month>",
        "<weekday> the <day> of <month>",
        "the <day> of <month> nineteen <ten> <unit>",
        "the <day> of <month> twenty <teen>",
    ],
    "clock": [
        "<hour> thirty",
        "<hour> fifteen",
        "<hour> forty five",
        "half past <hour>",
        "quarter past <hour>",
        "quarter to <hour>",
        "<hour> in the <daypart>",
    ],
    "code": [
        "<digit> <digit> <digit>",
        "<digit> <digit> <digit> <digit>",
        "<digit> <digit> <digit> <digit> <digit> <digit>",
    ],
    "who": ["<name>", "<name>", "the <person>", "the <size> <person>", "my <person>"],
    "what": ["the <thing>", "a <colour> <thing>", "the <size> <thing>", "the <colour> <thing>"],
    "beast": ["the <animal>", "a <colour> <animal>", "the <size> <animal>"],
    "where": [
        "to the <site>",
        "across the <site>",
        "near the <site>",
        "behind the <site>",
        "through the <site>",
        "from the <site> to the <site>",
        "to <place>",
        "from <place> to <place>",
    ],
    "command": [
        "turn on the <device>",
        "turn off the <device>",
        "turn on the <room> <device>",
        "turn off the <device> in the <room>",
        "switch on the <device> in the <room>",
        "please switch off the <room> <device>",
        "set the <device> to <under_hundred>",
        "set the <room> temperature to <under_hundred> degrees",
        "set a timer for <under_hundred> <span>",
        "set an alarm for <clock>",
        "wake me up at <clock>",
        "play some <media> in the <room>",
        "stop the <media>",
        "call <name>",
        "call <name> at <clock>",
        "send a message to <name>",
        "remind me to call <name> on <weekday>",
        "remind me to buy <food> <when>",
        "open the <room> door",
        "close the <room> window",
        "add <food> and <food> to the list",
        "show me the news from <place>",
        "book a table for <unit> at <clock>",
        "turn <side> at the <site>",
        "delete message number <under_hundred>",
        "cancel my meeting with <name> on <weekday>",
    ],
    "fact": [
        "the weather in <place> is <weather>",
        "the weather <when> will be <weather> and <weather>",
        "it will be <weather> in <place> on <weekday>",
        "the train to <place> leaves at <clock>",
        "the next flight from <place> to <place> leaves on <weekday>",
        "the <thing> costs <number> <currency>",
        "<name> paid <number> <currency> for the <thing>",
        "the <site> is <number> <measure> from here",
        "the meeting with <name> is on <date>",
        "today is <date>",
        "<name> was born on <date>",
        "the number is <code>",
        "the code for the <room> door is <code>",
        "my phone number is <code>",
        "the answer is <number>",
        "we waited <under_hundred> <span> in the <site>",
        "the <site> opens at <clock>",
        "there are <under_hundred> <person_plural> in the <site>",
    ],
    "person_plural": ["teachers", "doctors", "farmers", "sailors", "students", "soldiers"],
    "story": [
        "<who> <moved> <where>",
        "<who> <manner> <moved> <where>",
        "<who> <handled> <what>",
        "<who> <handled> <what> near the <site>",
        "<who> <handled> <what> and <moved> <where>",
        "<who> <met> <who>",
        "<who> <met> <beast>",
        "<who> <often> <met> <who> in the <daypart>",
        "<beast> <moved> <where>",
        "<beast> was <mood>",
        "<who> was <mood> and <mood>",
        "<who> was <mood> <link> <who> <handled> <what>",
        "<who> <moved> <where> <link> it was <weather>",
        "<who> and <who> <moved> <where> on <weekday>",
        "in the <daypart> <who> <handled> <what>",
        "one <daypart> in <month> <who> <met> <who>",
        "<manner> <who> <handled> <what> in the <site>",
        "<who> wanted to eat <food> and <food>",
        "<who> had <food> with <food> in <place>",
        "<when> <who> will travel <where>",
        "many <span> later <who> <moved> <where>",
        "<name> told <name> a story about <beast>",
        "<who> said that <who> was <mood>",
        "<who> <handled> <what> <link> <who> <moved> <where> and <who> was <mood>",
        "where is <what>",
        "why was <who> so <mood>",
        "how many <span> will <who> stay in <place>",
        "what is the weather in <place>",
        "when does the train to <place> leave",
    ],
    "fragment": [
        "<name>",
        "<place>",
        "<number>",
        "<number>",
        "<weekday>",
        "<date>",
        "<clock>",
        "yes",
        "thank you",
        "good <daypart>",
        "hello <name>",
        "goodbye <name>",
        "<colour> <thing>",
        "<size> <animal>",
        "<food>",
        "please help",
        "<when>",
        "the <site>",
        "<weather>",
        "<person>",
    ],
    "short": ["<any_word>", "<any_word> <any_word>", "<fragment>"],
    "sentence": ["<command>", "<fact>", "<story>", "<story>", "<fragment>"],
}


@cache
def _rules() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Return every rule as its alternatives, each one a tuple of words and `<rule>` names."""
    lists = {name: words.split() for name, words in _WORD_LISTS.items()}
    merged = {**lists, **_RULES}
    spoken = {
        word
        for alternatives in merged.values()
        for alternative in alternatives
        for word in alternative.split()
        if not word.startswith("<")
    }
    merged["any_word"] = sorted(spoken)
    return {name: tuple(tuple(a.split()) for a in rule) for name, rule in merged.items()}


def words() -> list[str]:
    """Return every word that the grammar can speak, sorted."""
    return [alternative[0] for alternative in _rules()["any_word"]]


def sentence(random: Random, rule: str = "sentence") -> str:
    """Return one random sentence of a rule, whether held out or not."""
    return " ".join(_expand(random, rule))


def is_held_out(text: str) -> bool:
    """Say whether a sentence belongs to the tenth that training never sees."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_IN == 0


def draw(random: Random, rule: str = "sentence", *, held_out: bool = False) -> str:
    """Return one random sentence from the trained-on part of a rule or from the held-out part."""
    while True:
        text = sentence(random, rule)
        if is_held_out(text) == held_out:
            return text


def _expand(random: Random, rule: str) -> list[str]:
    spoken: list[str] = []
    for token in random.choice(_rules()[rule]):
        if token.startswith("<"):
            spoken += _expand(random, token[1:-1])
        else:
            spoken.append(token)
    return spoken
