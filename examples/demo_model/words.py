"""The closed vocabulary of the demo corpus: names, things, places and a small table of facts.

Everything here was written for this project; no list was taken from elsewhere.
"""

from __future__ import annotations


def split(text: str) -> tuple[str, ...]:
    """The comma-separated items of `text`, stripped."""
    return tuple(item.strip() for item in text.replace("\n", " ").split(",") if item.strip())


SHE = split("""Ann, Mia, Lily, Rosa, Nora, Ella, Zoe, Ida, Clara, Maya, Ruth, Hanna, Tess, Vera, Lena, Alice, Emma,
Sara, Olga, Ines, Nina, Lucy, Ada, Iris, Molly, Wilma, Greta, Pia, Amina, Leila, Yuki, Priya, Sofia, Julia, Marta,
Fay, Dora, Kate, Jane, Mary, Laura, Anna, Eva, Grace, Helen, Maria, Rita, Susan, Tina, Paula""")
HE = split("""Tom, Ben, Max, Leo, Sam, Finn, Otto, Hugo, Emil, Paul, Jack, Theo, Noah, Oscar, Felix, Karl, Ravi, Omar,
Ivan, Luca, Peter, Adam, Jonas, Milo, Ned, Gus, Henry, Albert, Victor, Simon, Kofi, Tariq, Kenji, Pablo, Marco, Erik,
Nils, Rob, Dan, Tim, John, James, David, Daniel, Michael, Robert, Mark, Lukas, Anton, Frank, Bob, Alex, Bo""")
NAMES = SHE + HE

ANIMALS = split("""fox, bear, rabbit, mouse, owl, cat, dog, duck, frog, hedgehog, squirrel, turtle, goat, pig, sheep,
horse, crow, beaver, badger, otter, deer, wolf, goose, hen, lamb, mole, snail, swan, penguin, lion, monkey, elephant,
tiger, whale, robin, bee, donkey, kitten, puppy, parrot""")
PEOPLE = split("""girl, boy, baker, farmer, fisherman, gardener, painter, sailor, teacher, shepherd, postman, miller,
tailor, knight, king, queen, princess, prince, robot, dragon, giant, wizard""")
MALE_ONLY = frozenset(split("boy, fisherman, postman, king, prince"))
FEMALE_ONLY = frozenset(split("girl, queen, princess, hen"))
TRAITS = split("""little, young, old, kind, brave, shy, clever, quiet, curious, funny, gentle, happy, hungry, lonely,
proud, sleepy, small, tall, tiny, careful, cheerful, patient""")
COLOURS = split("red, blue, green, yellow, white, black, brown, orange, pink, purple, grey, golden, silver")
SIZES = split("big, small, tiny, long, round, soft, shiny, old, new, heavy, light, warm, pretty, strange, wooden")
THINGS = split("""ball, kite, hat, scarf, lamp, bell, drum, boat, book, box, key, ring, cup, basket, blanket, coat,
doll, flute, spoon, shoe, stone, shell, button, map, clock, mirror, umbrella, bucket, bottle, ribbon, whistle, wagon,
candle, pillow, pencil, glove, coin, marble, feather, violin""")
FOODS = split("""bread, cake, soup, apple pie, honey, cheese, jam, porridge, nuts, berries, carrots, apples, pears,
plums, pancakes, cookies, milk, rice, beans, butter""")
PLACES = split("""forest, village, garden, meadow, valley, town, farm, castle, harbour, island, mountain, lake, river,
beach, market, school, mill, desert, cave, city, field, hill, park, swamp""")
SPOTS = split("""under the bed, behind the door, near the well, under the old oak, by the river, on the roof, in the
tall grass, behind the barn, in the kitchen, under the bridge, beside the road, in the cellar, at the market, near the
pond, in the attic, under the table, by the gate, on the hill, among the flowers, inside an empty box""")
TREES = split("oak, birch, pine, apple tree, willow, cherry tree, maple, pear tree")
FLOWERS = split("rose, tulip, daisy, sunflower, lily, poppy, violet")
WEATHERS = split("sunny, rainy, cloudy, windy, snowy, foggy, stormy, clear, warm, cold")
CITIES = split("""Paris, London, Berlin, Rome, Madrid, Tokyo, Oslo, Vienna, Lisbon, Dublin, Prague, Athens, Cairo,
Lima, Delhi, Boston, Chicago, Toronto, Sydney, Nairobi, Helsinki, Warsaw, Seoul, Havana, Geneva, Munich, Porto,
Kyoto""")
NUMBERS = split("""zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty""")
DAYS = split("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = split("January, February, March, April, May, June, July, August, September, October, November, December")

# Further everyday words for the text skills (copying, reversing, spelling), where meaning does not matter.
PLAIN = split("""about, above, after, again, air, all, almost, also, always, answer, arm, ask, away, back, bad, bag,
bake, bank, bath, be, because, bed, before, begin, below, best, better, bird, bite, blow, body, bone, both, bottom,
branch, break, bright, bring, brother, build, burn, bus, busy, buy, call, can, car, care, carry, catch, chair, change,
cheap, child, choose, circle, clean, climb, close, cloud, cold, colour, come, cook, cool, corner, count, country,
cover, cross, cry, cut, dance, dark, daughter, day, deep, desk, different, dig, dinner, dish, door, down, draw, dream,
dress, drink, drive, drop, dry, dust, each, ear, early, earth, east, easy, eat, edge, egg, empty, end, enough,
evening, every, eye, face, fall, family, far, fast, father, feel, few, fight, fill, find, finger, fire, first, fish,
floor, flower, fly, fold, follow, food, foot, forget, free, fresh, friend, from, front, fruit, full, game, give,
glass, go, good, grass, great, ground, group, grow, guess, hair, half, hand, hang, hard, head, hear, heart, help,
here, hide, high, hold, hole, home, hope, hot, hour, house, how, ice, idea, inside, jump, keep, kick, kind, kitchen,
knee, know, lady, land, large, last, late, laugh, lead, leaf, learn, leave, left, leg, letter, life, lift, line,
listen, live, look, love, low, lunch, make, man, many, meal, mean, meet, middle, minute, moon, morning, mother, mouth,
move, much, music, must, name, near, neck, need, never, next, nice, night, noise, north, nose, nothing, now, number,
of, often, once, only, open, other, over, page, paint, paper, part, party, path, picture, piece, plant, plate, play,
point, pour, pull, push, quick, quiet, race, rain, read, ready, rest, rich, ride, right, rise, road, rock, roll, room,
rope, run, safe, salt, same, sand, say, sea, second, see, seed, send, shape, sharp, shine, ship, shop, short, show,
side, sing, sister, sit, skin, sky, sleep, slow, smell, smile, snow, some, song, soon, sound, south, speak, spring,
stand, star, start, stay, step, still, stop, storm, story, street, strong, summer, sun, sure, sweet, swim, table,
tail, take, talk, taste, teach, tell, thank, thick, thin, think, throw, time, today, together, tomorrow, tooth, top,
touch, tree, true, try, turn, under, until, use, very, visit, voice, wait, walk, wall, want, wash, water, wave, way,
week, well, west, wet, what, wheel, when, where, which, wide, wind, window, wing, winter, wish, with, woman, wood,
word, work, world, write, year, yes, yesterday, young, engine, token, model, server, python, memory, cache, batch,
kernel, graph, vector, matrix, code, test, data, file, function, value, error, string""")
ACCENTED = split("""café, naïve, über, señor, garçon, déjà, vu, façade, jalapeño, résumé, smörgås, ångström, piñata,
crème, Zürich, São, Łódź, привет, мир, γειά, 你好, 世界, こんにちは, 안녕, 🙂, 🚀, ☀, ✓, →, €""")

CAPITALS = dict(
    pair.split(":")
    for pair in split("""France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Japan:Tokyo, Norway:Oslo,
Austria:Vienna, Portugal:Lisbon, Ireland:Dublin, Greece:Athens, Egypt:Cairo, Peru:Lima, India:New Delhi,
Finland:Helsinki, Poland:Warsaw, Cuba:Havana, England:London, Sweden:Stockholm, Denmark:Copenhagen, Kenya:Nairobi,
China:Beijing, Russia:Moscow, Canada:Ottawa, Hungary:Budapest, Belgium:Brussels""")
)
UNKNOWN_COUNTRIES = split("""Chile, Ghana, Nepal, Laos, Turkey, Brazil, Mexico, Iceland, Morocco, Vietnam, Thailand,
Bolivia, Jordan, Latvia, Estonia, Croatia, Senegal, Uganda, Fiji, Malta, Oman, Qatar, Samoa, Tonga, Zambia, Mali,
Chad, Benin, Haiti""")
COLOUR_OF = dict(
    pair.split(":")
    for pair in split("""the sky:blue, grass:green, snow:white, a lemon:yellow, a banana:yellow, a carrot:orange,
coal:black, a tomato:red, a cherry:red, milk:white, the sun:yellow, a leaf:green, blood:red, chocolate:brown, a
frog:green, a crow:black, a swan:white, a strawberry:red, the night:black, a cloud:white, the sea:blue""")
)
SOUND_OF = dict(
    pair.split(":")
    for pair in split("""a cat:meow, a dog:woof, a cow:moo, a duck:quack, a sheep:baa, a pig:oink, a horse:neigh, an
owl:hoot, a frog:croak, a bee:buzz, a lion:roar, a mouse:squeak, a hen:cluck, a snake:hiss, a crow:caw, a wolf:howl""")
)
OPPOSITE = dict(
    pair.split(":")
    for pair in split("""hot:cold, big:small, up:down, left:right, day:night, old:young, happy:sad, fast:slow,
open:closed, full:empty, wet:dry, high:low, hard:soft, long:short, light:dark, good:bad, first:last, rich:poor,
early:late, near:far, loud:quiet, strong:weak, yes:no, in:out, thick:thin, clean:dirty, easy:difficult, on:off,
true:false, front:back, wide:narrow""")
)
LEGS = dict(
    pair.split(":")
    for pair in split("""a cat:4, a dog:4, a spider:8, a bird:2, an ant:6, a horse:4, a bee:6, a hen:2, a cow:4, a
snake:0, a fish:0, a fly:6, a person:2, a duck:2, a fox:4, a frog:4""")
)
HOMES = dict(
    pair.split(":")
    for pair in split("""a bird:in a nest, a fish:in the water, a bee:in a hive, a fox:in a den, a rabbit:in a burrow,
a horse:in a stable, a king:in a castle, a bear:in a cave, a frog:near a pond, a dog:in a kennel, a whale:in the sea""")
)
