"""Simple stories with one hero, a friend, a place and a thing, each with a beginning, a middle and an end.

A story is drawn from one of ten plots; every sentence has a few forms. Names, kinds, places and things are chosen once
for each story (`Cast`), so that what is lost is what is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import words


@dataclass(frozen=True)
class Being:
    """Somebody in a story."""

    name: str
    kind: str
    trait: str
    he: str  # "he" or "she"

    @property
    def him(self) -> str:
        """The object form of the pronoun."""
        return "him" if self.he == "he" else "her"

    @property
    def his(self) -> str:
        """The possessive form of the pronoun."""
        return "his" if self.he == "he" else "her"


@dataclass(frozen=True)
class Cast:
    """What a story is about."""

    hero: Being
    friend: Being
    place: str
    thing: str
    look: str  # adjective of the thing
    food: str


@dataclass(frozen=True)
class Story:
    """A story's text and what it was made from."""

    text: str
    cast: Cast
    plot: str


def a(noun: str) -> str:
    """`noun` with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def being(rng: Random, name: str | None = None, kind: str | None = None) -> Being:
    """A being whose pronoun agrees with its name and kind; `name` or `kind` may be given."""
    if kind is None:
        fitting = None if name is None else (words.MALE_ONLY if name in words.SHE else words.FEMALE_ONLY)
        kinds = words.ANIMALS + words.PEOPLE
        kind = rng.choice([k for k in kinds if fitting is None or k not in fitting])
    if name is None:
        pool = words.HE if kind in words.MALE_ONLY else words.SHE if kind in words.FEMALE_ONLY else words.NAMES
        name = rng.choice(pool)
    he = "he" if name in words.HE or (name not in words.SHE and kind not in words.FEMALE_ONLY) else "she"
    return Being(name, kind, rng.choice(words.TRAITS), he)


def cast(
    rng: Random, name: str | None = None, kind: str | None = None, place: str | None = None, thing: str | None = None
) -> Cast:
    """A cast, random where nothing is given; hero and friend differ in name and kind."""
    hero = being(rng, name, kind)
    friend = being(rng)
    while friend.name == hero.name or friend.kind == hero.kind:
        friend = being(rng)
    look = rng.choice(words.COLOURS + words.SIZES)
    return Cast(
        hero,
        friend,
        place or rng.choice(words.PLACES),
        thing or rng.choice(words.THINGS),
        look,
        rng.choice(words.FOODS),
    )


def opening(rng: Random, c: Cast) -> str:
    """The first sentence or two."""
    h = c.hero
    where = rng.choice([f"near the {c.place}", f"in a house by the {c.place}", f"at the edge of the {c.place}"])
    kind = rng.choice([h.kind, f"{h.trait} {h.kind}"])
    return rng.choice([
        f"Once upon a time, there was {a(kind)} named {h.name}. {h.name} lived {where}.",
        f"Once upon a time, {a(kind)} named {h.name} lived {where}.",
        f"There once was {a(kind)} called {h.name}, who lived {where}.",
        f"{h.name} was {a(kind)} who lived {where}.",
        f"Long ago, {a(kind)} named {h.name} lived {where}.",
    ])  # fmt: skip


def meeting(rng: Random, c: Cast) -> str:
    """A sentence that brings in the friend."""
    h, f = c.hero, c.friend
    return rng.choice([
        f"On the way {h.he} met {f.name} the {f.kind}.",
        f"Then {f.name} the {f.kind} came by.",
        f"Soon {h.name} met {a(f.kind)} named {f.name}.",
        f"Just then {h.his} friend {f.name} the {f.kind} came along.",
    ])  # fmt: skip


def ending(rng: Random, c: Cast) -> str:
    """A last sentence that fits any plot."""
    h, f = c.hero, c.friend
    return rng.choice([
        f"From that day on, {h.name} and {f.name} were the best of friends.",
        f"That night {h.name} slept very well.",
        f"{h.name} and {f.name} laughed and walked home together.",
        f"And {h.name} never forgot that day.",
        f"After that, {h.name} and {f.name} met every day.",
        f"{h.name} smiled all the way home.",
    ])  # fmt: skip


def lost(rng: Random, c: Cast) -> list[str]:
    """The hero loses the thing and the friend finds it."""
    h, f, thing = c.hero, c.friend, c.thing
    first, second, third = rng.sample(words.SPOTS, 3)
    return [
        rng.choice(
            [
                f"{h.name} had {a(c.look)} {thing} and loved it very much.",
                f"{h.name} had {a(c.look)} {thing}. It was {h.his} favourite thing.",
            ]
        ),
        rng.choice(
            [
                f"One day, the {thing} was gone.",
                f"One morning, {h.name} could not find the {thing}.",
                f"But one day {h.he} lost the {thing}.",
            ]
        ),
        rng.choice(
            [f"{h.name} looked {first}, but it was not there.", f"{h.he.capitalize()} looked {first}. No {thing}!"]
        ),
        f"{h.he.capitalize()} looked {second}, but it was not there either.",
        rng.choice([f"{h.name} was very sad.", f"{h.name} sat down and began to cry."]),
        meeting(rng, c),
        rng.choice([f'"What is wrong?" asked {f.name}.', f'"Why are you so sad?" asked {f.name}.']),
        rng.choice([f'"I lost my {thing}," said {h.name}.', f'"My {c.look} {thing} is gone," said {h.name}.']),
        rng.choice([f'"I will help you," said {f.name}.', f'"Let us look together," said {f.name}.']),
        rng.choice(
            [f"They looked {third}, and there was the {thing}!", f"At last {f.name} found the {thing} {third}."]
        ),
        rng.choice([f'"Thank you!" said {h.name}.', f"{h.name} was so happy that {h.he} gave {f.name} a hug."]),
    ]


def baking(rng: Random, c: Cast) -> list[str]:
    """The hero wants to cook something and shares it."""
    h, f = c.hero, c.friend
    one, two = rng.sample(["flour", "sugar", "eggs", "salt", "water", "butter", "milk", "apples"], 2)
    return [
        rng.choice(
            [f"One day, {h.name} wanted to make {c.food}.", f"One morning, {h.name} was hungry and wanted {c.food}."]
        ),
        f"{h.he.capitalize()} had {one}, but {h.he} had no {two}.",
        rng.choice([f"So {h.name} went out to find some {two}.", f"So {h.he} walked to the market to get {two}."]),
        meeting(rng, c),
        f'"Do you have any {two}?" asked {h.name}.',
        rng.choice(
            [f'"Yes," said {f.name}. "You can have some of mine."', f'"I have a lot of {two} at home," said {f.name}.']
        ),
        rng.choice(
            [
                "They went to the kitchen and worked together all morning.",
                f"Together they mixed the {one} and the {two}.",
            ]
        ),
        rng.choice(["Soon the house smelled wonderful.", f"Soon the {c.food} was on the table."]),
        rng.choice([f"{h.name} gave the first piece to {f.name}.", f"{h.name} and {f.name} ate until they were full."]),
        rng.choice(
            [f'"It is good to share," said {h.name}.', f'"This is the best {c.food} I ever had," said {f.name}.']
        ),
    ]


def afraid(rng: Random, c: Cast) -> list[str]:
    """The hero is afraid of something and learns not to be."""
    h, f = c.hero, c.friend
    fear, place, deed = rng.choice([
        ("the dark", "the dark cave", "walked into the cave"),
        ("deep water", "the lake", "jumped into the water"),
        ("thunder", "the hill", "listened to the thunder"),
        ("high places", "the tall tower", "climbed the tower"),
        ("the old bridge", "the old bridge", "walked over the bridge"),
    ])  # fmt: skip
    return [
        f"{h.name} was afraid of {fear}.",
        rng.choice(
            [f"The others laughed at {h.him}, and that made {h.him} sad.", f"{h.he.capitalize()} did not tell anyone."]
        ),
        rng.choice([f"One day, {h.name} went for a walk.", f"One evening, {h.name} stood near {place}."]),
        meeting(rng, c),
        f'"Come with me to {place}," said {f.name}.',
        f'"I cannot," said {h.name}. "I am afraid of {fear}."',
        rng.choice(
            [
                f'"Take my hand," said {f.name}. "We will go slowly."',
                f'"I was afraid too," said {f.name}. "It gets better."',
            ]
        ),
        f"Step by step, they went to {place}.",
        rng.choice(
            [f"{h.name} took a deep breath and {deed}.", f"{h.name} closed {h.his} eyes, counted to three and {deed}."]
        ),
        rng.choice(["It was not so bad at all!", "Nothing bad happened."]),
        rng.choice([f'"I did it!" said {h.name}.', f'"You are very brave," said {f.name}.']),
    ]


def kindness(rng: Random, c: Cast) -> list[str]:
    """The hero helps a stranger, who helps in turn."""
    h, f = c.hero, c.friend
    return [
        rng.choice(
            [
                f"One cold day, {h.name} was walking home with some {c.food}.",
                f"One day, {h.name} went out with a bag of {c.food}.",
            ]
        ),
        rng.choice(
            [
                f"By the road sat {a(f.kind)} named {f.name}.",
                f"{h.he.capitalize()} saw {a(f.kind)} named {f.name} under a tree.",
            ]
        ),
        rng.choice([f"{f.name} was tired and hungry.", f"{f.name} was cold and had nothing to eat."]),
        rng.choice([f'"Please take my {c.food}," said {h.name}.', f"{h.name} gave {f.name} all of the {c.food}."]),
        rng.choice(
            [f'"Thank you," said {f.name}. "I will never forget this."', f'"You are very kind," said {f.name}.']
        ),
        rng.choice(
            [
                f"Many days later, {h.name} lost the way in the {c.place}.",
                f"Some time later, {h.name} fell into a deep hole.",
            ]
        ),
        rng.choice([f'"Help!" called {h.name}.', f"{h.he.capitalize()} called for help, but nobody came."]),
        rng.choice(
            [f"Then {f.name} heard {h.him} and came running.", f"Then {f.name} came, because {f.he} knew that voice."]
        ),
        rng.choice([f'"You helped me, and now I help you," said {f.name}.', f"{f.name} took {h.him} home."]),
    ]


def race(rng: Random, c: Cast) -> list[str]:
    """The hero is slow, practises and does well."""
    h, f = c.hero, c.friend
    sport, act = rng.choice(
        [("race", "run"), ("singing contest", "sing"), ("swimming race", "swim"), ("dancing contest", "dance")]
    )
    return [
        f"Every summer there was a {sport} in the {c.place}.",
        rng.choice([
            f"{h.name} wanted to win, but {h.he} could not {act} very well.",
            f'"You cannot {act}," the others said to {h.name}.',
        ]),
        rng.choice([f"So every morning {h.name} got up early to {act}.", f"So {h.name} practised day after day."]),
        meeting(rng, c),
        f'"Will you help me to {act} better?" asked {h.name}.',
        rng.choice([f'"Yes," said {f.name}. "Try again, and do not give up."', f'"Of course," said {f.name}.']),
        f"At last the day of the {sport} came.",
        rng.choice([f"{h.name} was nervous, but {h.he} did {h.his} best.", "Everybody came to watch."]),
        rng.choice([
            f"{h.name} won, and the prize was {a(c.look)} {c.thing}.",
            f"{h.name} came second and got {a(c.look)} {c.thing}.",
        ]),
        rng.choice([
            f'"You helped me," said {h.name} to {f.name}. "This is for both of us."',
            f"{f.name} was very proud of {h.him}.",
        ]),
    ]  # fmt: skip


def storm(rng: Random, c: Cast) -> list[str]:
    """A storm comes and the hero shares a shelter."""
    h, f = c.hero, c.friend
    return [
        rng.choice(
            [
                f"One day, {h.name} went to the {c.place} to pick flowers.",
                f"One afternoon, {h.name} was playing outside.",
            ]
        ),
        rng.choice(
            [
                "Suddenly the sky turned dark and the wind began to blow.",
                "Then black clouds came, and it began to rain.",
            ]
        ),
        f"{h.name} ran as fast as {h.he} could.",
        rng.choice(
            [f"{h.he.capitalize()} found a small cave and went inside.", f"{h.he.capitalize()} hid under a big tree."]
        ),
        f"{f.name} the {f.kind} was there too, wet and cold.",
        rng.choice([f'"May I stay here with you?" asked {h.name}.', f'"Are you afraid of the storm?" asked {h.name}.']),
        rng.choice(
            [f'"Yes," said {f.name}. "Come and sit with me."', f'"A little," said {f.name}. "Please stay with me."']
        ),
        rng.choice(
            [f"They shared some {c.food} and told each other stories.", "They sang songs until the rain stopped."]
        ),
        rng.choice(["When the storm was over, there was a rainbow in the sky.", "At last the sun came out again."]),
    ]


def journey(rng: Random, c: Cast) -> list[str]:
    """The hero goes to see something far away."""
    h, f = c.hero, c.friend
    goal = rng.choice(
        ["the sea", "the snow", "the big city", "the highest mountain", "the old castle", "the moon over the lake"]
    )
    one, two = rng.sample(
        ["over a hill", "through a forest", "across a river", "along a long road", "past a mill", "through a valley"], 2
    )
    return [
        f"{h.name} had never seen {goal}.",
        rng.choice(
            [
                f"One morning, {h.he} took {a(c.look)} {c.thing} and set out.",
                f"One day, {h.he} said goodbye and started to walk.",
            ]
        ),
        f"{h.name} went {one}.",
        meeting(rng, c),
        f'"Where are you going?" asked {f.name}.',
        f'"I want to see {goal}," said {h.name}.',
        rng.choice([f'"May I come with you?" asked {f.name}.', f'"I know the way," said {f.name}.']),
        f"So they went on together, {two}.",
        rng.choice(
            [f"When they were tired, they ate some {c.food} and rested.", "At night they slept under the stars."]
        ),
        rng.choice([f"At last they saw {goal}.", f"After three days, they came to {goal}."]),
        rng.choice(
            [f'"It is beautiful," said {h.name}.', f'"It was a long way, but I am glad we came," said {f.name}.']
        ),
    ]


def quarrel(rng: Random, c: Cast) -> list[str]:
    """Two friends want the same thing, and make up."""
    h, f, thing = c.hero, c.friend, c.thing
    return [
        f"{h.his.capitalize()} best friend was {a(f.kind)} named {f.name}.",
        rng.choice(
            [
                f"One day they found {a(c.look)} {thing} in the {c.place}.",
                f"One day they saw {a(c.look)} {thing} on the road.",
            ]
        ),
        f'"It is mine," said {h.name}. "I saw it first!"',
        f'"No, it is mine," said {f.name}.',
        rng.choice(
            [f"They both pulled at the {thing}, and it broke.", f"They shouted at each other, and {f.name} went home."]
        ),
        rng.choice(["Now nobody was happy.", f"{h.name} was alone and felt sad."]),
        f'The next day {h.name} said, "I am sorry."',
        f'"I am sorry too," said {f.name}.',
        rng.choice(
            [
                f"Together they mended the {thing} and took turns with it.",
                f"They made the {thing} as good as new and shared it.",
            ]
        ),
        rng.choice(
            [f'"A friend is better than {a(thing)}," said {f.name}.', f'"We can both play with it," said {h.name}.']
        ),
    ]


def seed(rng: Random, c: Cast) -> list[str]:
    """The hero plants a seed and waits."""
    h, f = c.hero, c.friend
    plant = rng.choice(words.TREES + words.FLOWERS)
    return [
        rng.choice(
            [
                f"One spring day, {h.name} found a small seed.",
                f"One day, {h.name} got a tiny seed from {h.his} grandmother.",
            ]
        ),
        rng.choice(
            [
                f"{h.he.capitalize()} put it into the ground near the house.",
                f"{h.he.capitalize()} planted it in the garden.",
            ]
        ),
        f"Every day {h.name} gave it water.",
        rng.choice(["For a long time nothing happened.", "One week went by, and then another."]),
        f'"It will never grow," said {f.name} the {f.kind}.',
        rng.choice([f'"We must wait," said {h.name}.', f'"I will not give up," said {h.name}.']),
        rng.choice(
            [
                "Then one morning there was a little green leaf.",
                "Then, after the rain, a green leaf came out of the ground.",
            ]
        ),
        f"It grew and grew, until it was a beautiful {plant}.",
        rng.choice([f'"You were right," said {f.name}.', f"{f.name} looked at the {plant} for a long time."]),
        rng.choice(
            [
                f"{h.name} and {f.name} sat beside the {plant} and ate {c.food}.",
                f'"Good things take time," said {h.name}.',
            ]
        ),
    ]


def noise(rng: Random, c: Cast) -> list[str]:
    """A strange sound at night turns out to be a friend."""
    h, f = c.hero, c.friend
    sound = rng.choice(["tap, tap, tap", "knock, knock", "scratch, scratch", "bump, bump", "hoo, hoo"])
    spot = rng.choice(words.SPOTS)
    return [
        rng.choice([f"One night, {h.name} heard a strange sound.", f"One night, {h.name} could not sleep."]),
        f'"{sound.capitalize()}," it went.',
        rng.choice([f'"What is that?" said {h.name}.', f'"Who is there?" asked {h.name}, but nobody answered.']),
        rng.choice(
            [
                f"{h.he.capitalize()} took a lamp and got up.",
                f"{h.he.capitalize()} put on {h.his} coat and went to look.",
            ]
        ),
        f'"{sound.capitalize()}," it went again.',
        f"{h.name} looked {spot}.",
        f"There was {a(f.kind)}, small and cold.",
        rng.choice(
            [
                f'"My name is {f.name}," said the {f.kind}. "I lost my way home."',
                f'"I am {f.name}," said the {f.kind}. "May I come in?"',
            ]
        ),
        rng.choice(
            [f'"Come in and get warm," said {h.name}.', f"{h.name} gave {f.name} some {c.food} and a warm blanket."]
        ),
        rng.choice(
            [
                f"In the morning they went to the {c.place} together.",
                f"Now {h.name} was not afraid of the sound any more.",
            ]
        ),
    ]


PLOTS = {
    "lost": lost, "baking": baking, "afraid": afraid, "kindness": kindness, "race": race,
    "storm": storm, "journey": journey, "quarrel": quarrel, "seed": seed, "noise": noise,
}  # fmt: skip
USES_THING = ("lost", "race", "quarrel")


def story(rng: Random, given: Cast | None = None, plot: str | None = None) -> Story:
    """A whole story of 8 to 15 sentences, about `given` or about a random cast."""
    c = given or cast(rng)
    plot = plot or rng.choice(list(PLOTS))
    return Story(" ".join([opening(rng, c), *PLOTS[plot](rng, c), ending(rng, c)]), c, plot)
