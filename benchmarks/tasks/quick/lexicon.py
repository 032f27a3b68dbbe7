"""The hand-written word tables behind the quick suite, in two halves that share no content word.

Every word belongs to one half for all tasks: a multi-task model trained on one half has never been trained on a
noun, name, verb or adjective of the other. Function words and the fixed words of the sentence frames are shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

Words = tuple[str, ...]
Pairs = tuple[tuple[str, str], ...]
Triples = tuple[tuple[str, str, str], ...]
Table = dict[str, Words]


def _items(text: str) -> Words:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _pairs(text: str) -> Pairs:
    return tuple((left.strip(), right.strip()) for left, right in (item.split("=") for item in _items(text)))


def _triples(text: str) -> Triples:
    return tuple((a.strip(), b.strip(), c.strip()) for a, b, c in (item.split("=") for item in _items(text)))


def _table(text: str) -> Table:
    rows = (line.split(":") for line in text.strip().splitlines())
    return {key.strip(): tuple(values.split()) for key, values in rows}


@dataclass(frozen=True)
class Vocabulary:
    """One half of the words."""

    roles: Words  # people, by what they do
    kin: Pairs  # people whose gender the noun tells: (female, male)
    names: Pairs  # first names: (female, male)
    cities: Words
    numbers: Words  # above one
    places: Words  # phrases that answer "where", of three words each
    times: Words  # phrases that answer "when"
    reasons: Words  # phrases that answer "why"
    opposites: Pairs  # adjectives of things: (adjective, antonym); no pair excludes another
    actions: Pairs  # verbs with a person as subject and a thing as object: (verb, synonym)
    contacts: Pairs  # verbs between persons, either way round: (verb, synonym)
    gifts: Words  # verbs that take both "someone something" and "something to someone"
    solo: Words  # intransitive verbs
    reflexive: Words  # verbs for what people naturally do to themselves
    states: Words  # adjectives of people
    factive: Words  # verbs whose "that" clause is true
    opinion: Words  # verbs whose "that" clause may be false
    achieving: Words  # verbs whose "to" clause came true
    attempting: Words  # verbs whose "to" clause did not, or may not have, come true
    praise: Words  # adjectives of a favourable review
    blame: Words  # adjectives of an unfavourable review
    works: Words  # what is reviewed
    aspects: Words  # parts of any of `works`
    things: Table  # kind of thing -> members, all of which can be bought, found and looked at
    belongings: Words  # the kinds in `things` that people have at home
    scenery: Table  # further kinds -> members, for questions about kinds only
    parts: Pairs  # (kind, what its members and those of no other kind in this table have)
    uses: Pairs  # (kind, what its members are for)
    workers: Triples  # (worker, tool, what the tool is for)
    workplaces: Pairs  # (worker, place of work)
    materials: Table  # material -> things made of it
    young: Pairs  # (animal, its young)
    sounds: Pairs  # (animal, its sound)
    homes: Pairs  # (animal, where it lives)

    def words(self) -> frozenset[str]:
        """All content words, in lower case and not inflected."""
        found: set[str] = set()
        for field in fields(self):
            for text in _strings(getattr(self, field.name)):
                found.update(text.lower().split())
        return frozenset(found - FUNCTION_WORDS)


FUNCTION_WORDS = frozenset(
    _items("a, an, the, in, on, at, near, behind, beside, to, of, off, as, it, was, because, its, last")
)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _strings(item)


TRAIN = Vocabulary(
    roles=_items(
        "doctor, lawyer, farmer, teacher, pilot, baker, singer, plumber, judge, soldier, painter, waiter, "
        "actor, gardener, captain, dentist, butcher, driver, mayor, coach, scientist"
    ),
    kin=_pairs("woman=man, sister=brother, queen=king, actress=monk, daughter=son, bride=groom"),
    names=_pairs(
        "Anna=Peter, Maria=David, Laura=Thomas, Emma=Martin, Sarah=Robert, Julia=Daniel, Alice=Simon, Helen=Victor, "
        "Susan=James, Olivia=Frank"
    ),
    cities=_items("Paris, Rome, London, Madrid, Vienna, Berlin, Chicago, Dublin, Moscow, Cairo, Milan, Denver"),
    numbers=_items("three, five, seven, nine, twelve, twenty"),
    places=_items(
        "in the kitchen, at the market, near the river, behind the theater, on the beach, in the forest, "
        "at the station, in the office, beside the lake, in the village, near the fountain, at the hotel"
    ),
    times=_items(
        "on Monday, in March, in the morning, at noon, last week, on Friday, last summer, in June, on Wednesday, "
        "in January, in August, last autumn"
    ),
    reasons=_items(
        "because it looked cheap, because a colleague insisted, because it seemed valuable, "
        "because of a birthday party, because of an old rumor"
    ),
    opposites=_pairs("big=small, cheap=expensive, dry=wet, perfect=damaged, new=old"),
    actions=_pairs("buy=purchase, examine=inspect, conceal=hide, choose=select, steal=swipe"),
    contacts=_pairs(
        "help=assist, commend=applaud, greet=welcome, chase=pursue, hire=employ, scare=frighten, mock=ridicule, "
        "hug=embrace, phone=call, warn=alert"
    ),
    gifts=_items("give, lend, mail, show"),
    solo=_items("sleep, laugh, smoke, complain, swim, travel, dance, arrive, wander, whisper"),
    reflexive=_items("scare, mock, hurt, trust, help, commend, embarrass, wash"),
    states=_items("tired, hungry, busy, famous, lonely, polite, jealous, rich"),
    factive=_items("know, realize, regret"),
    opinion=_items("believe, claim, hope"),
    achieving=_items("manage, happen"),
    attempting=_items("fail, want, decline"),
    praise=_items(
        "wonderful, brilliant, charming, delightful, superb, enjoyable, touching, clever, gripping, splendid, moving, "
        "lovely, impressive, excellent, hilarious, captivating, refreshing, perfect, great, thoughtful"
    ),
    blame=_items(
        "terrible, boring, awful, clumsy, tedious, dreadful, stale, lifeless, horrible, silly, disappointing, ugly, "
        "predictable, confusing, sloppy, poor, cheap, unfunny, wooden, irritating"
    ),
    works=_items("film, comedy, series, documentary, musical, sequel, western, remake"),
    aspects=_items("plot, acting, soundtrack, ending, dialogue, photography"),
    things=_table(
        """
        bird: sparrow robin eagle parrot pigeon crow owl swan pelican
        fruit: apple pear banana cherry peach plum mango lemon melon
        instrument: violin trumpet cello flute piano guitar harp banjo clarinet
        tool: hammer wrench drill shovel chisel rake axe screwdriver
        fish: shark eel sardine minnow piranha herring
        vehicle: truck bus tractor van motorcycle taxi ambulance limousine
        garment: jacket coat skirt sweater scarf dress vest blouse
        weapon: sword dagger rifle spear pistol cannon
        """
    ),
    belongings=_items("instrument, tool, vehicle, garment, weapon, fruit"),
    scenery=_table(
        """
        tree: oak pine maple birch willow cedar beech elm
        building: castle barn cathedral palace chapel warehouse
        metal: iron copper silver tin lead zinc
        """
    ),
    parts=_pairs("bird=feathers, fish=gills, tree=branches, vehicle=an engine, garment=sleeves"),
    uses=_pairs(
        "instrument=to perform music, vehicle=to carry passengers, garment=to keep warm, weapon=to fight an enemy, "
        "fruit=to eat as a sweet dessert"
    ),
    workers=_triples(
        "painter=brush=spreading color, doctor=stethoscope=hearing heartbeats, "
        "plumber=wrench=tightening pipes, butcher=cleaver=chopping bones, gardener=rake=gathering leaves, "
        "singer=microphone=amplifying voices, baker=oven=heating dough, miner=pickaxe=breaking rocks, "
        "janitor=broom=sweeping floors, secretary=keyboard=typing letters, angler=rod=catching trout, "
        "teacher=chalkboard=explaining lessons"
    ),
    workplaces=_pairs(
        "farmer=a field, judge=a courtroom, pilot=a cockpit, waiter=a restaurant, actor=a stage, "
        "soldier=a barracks, teacher=a classroom, monk=a monastery, scientist=a laboratory"
    ),
    materials=_table(
        """
        glass: window mirror lens lightbulb
        wool: sweater scarf mitten
        paper: newspaper envelope poster magazine
        leather: boot saddle belt wallet
        wax: candle crayon
        clay: pot teacup
        """
    ),
    young=_pairs("cat=kitten, cow=calf, horse=foal, pig=piglet, duck=duckling, goat=kid, swan=cygnet"),
    sounds=_pairs("cow=moo, cat=meow, duck=quack, horse=neigh, pig=oink, owl=hoot, pigeon=coo"),
    homes=_pairs(
        "horse=a stable, pig=a sty, robin=a nest, fox=a den, beaver=a dam, shark=the ocean, camel=the desert, "
        "monkey=the jungle"
    ),
)

VALIDATION = Vocabulary(
    roles=_items(
        "nurse, carpenter, engineer, sailor, librarian, poet, chef, clerk, tailor, banker, barber, senator, guard, "
        "surgeon, dancer, author, professor, photographer, cashier, firefighter"
    ),
    kin=_pairs("girl=boy, mother=father, aunt=uncle, duchess=duke, niece=nephew, princess=prince"),
    names=_pairs(
        "Nora=Henry, Clara=Oscar, Ruth=Paul, Diana=George, Sophie=Lucas, Rachel=Walter, Irene=Edward, Martha=Felix"
    ),
    cities=_items("Lisbon, Prague, Boston, Oslo, Athens, Tokyo, Warsaw, Geneva, Seattle, Naples"),
    numbers=_items("four, six, eight, ten, eleven, thirty"),
    places=_items(
        "in the garden, at the airport, near the bridge, behind the school, on the roof, in the park, at the museum, "
        "in the library, beside the road, in the cellar"
    ),
    times=_items(
        "on Tuesday, in April, in the evening, at midnight, last month, on Sunday, last winter, in October, "
        "on Thursday, in December"
    ),
    reasons=_items(
        "because of a bet, because it smelled strange, because a neighbor wished it, because of its odd shape, "
        "because it was within reach"
    ),
    opposites=_pairs("heavy=light, clean=dirty, huge=tiny, beautiful=hideous, rare=common"),
    actions=_pairs("find=discover, notice=spot, display=exhibit, obtain=acquire, fetch=retrieve, sketch=draw"),
    contacts=_pairs(
        "rescue=save, criticize=denounce, tease=taunt, annoy=bother, push=shove, question=interrogate, "
        "defend=protect, imitate=copy, trick=deceive, teach=instruct"
    ),
    gifts=_items("offer, send, sell, bring"),
    solo=_items("cry, smile, wait, shout, cough, vanish, whistle, sneeze, yawn, stumble"),
    reflexive=_items("criticize, annoy, defend, punish, insult, forgive, injure, teach"),
    states=_items("angry, thirsty, sick, nervous, happy, proud, bored"),
    factive=_items("notice, learn, remember"),
    opinion=_items("think, suspect, assume"),
    achieving=_items("bother, dare"),
    attempting=_items("refuse, plan, promise"),
    praise=_items(
        "fantastic, entertaining, amazing, witty, thrilling, inspiring, memorable, marvelous, engaging, graceful, fun, "
        "terrific, beautiful, good, outstanding, stunning"
    ),
    blame=_items(
        "bad, dreary, atrocious, pointless, annoying, bland, mediocre, painful, shallow, forgettable, lame, tiresome, "
        "miserable, ridiculous, hideous, unbearable"
    ),
    works=_items("movie, play, drama, thriller, cartoon, opera, biopic, trilogy"),
    aspects=_items("story, script, pacing, direction, cast, finale"),
    things=_table(
        """
        insect: ant bee wasp beetle butterfly moth mosquito grasshopper
        vegetable: carrot onion potato cabbage cucumber radish turnip leek
        flower: rose tulip daisy lily orchid daffodil sunflower
        reptile: snake lizard crocodile turtle iguana gecko alligator
        boat: canoe ferry yacht kayak raft schooner
        container: bottle jar bucket barrel basket crate
        dog: poodle beagle terrier spaniel bulldog collie
        jewel: ruby emerald diamond sapphire pearl opal
        """
    ),
    belongings=_items("container, boat, dog, jewel, flower, vegetable"),
    scenery=_table(
        """
        sport: football tennis hockey basketball volleyball baseball
        country: France Spain Brazil Japan Egypt Canada
        drink: coffee tea milk beer cider lemonade
        """
    ),
    parts=_pairs("insect=six legs, reptile=scaly skin, flower=petals, boat=a hull, dog=fur"),
    uses=_pairs(
        "vegetable=to cook a soup, flower=to decorate a vase, boat=to cross a stretch of water, "
        "container=to store things, jewel=to wear around the neck"
    ),
    workers=_triples(
        "carpenter=saw=cutting boards, tailor=needle=sewing clothes, barber=razor=shaving beards, "
        "photographer=camera=taking pictures, astronomer=telescope=watching stars, chef=knife=slicing meat, "
        "sailor=compass=locating north, firefighter=hose=putting out fires, "
        "biologist=microscope=viewing germs, climber=harness=hanging off cliffs"
    ),
    workplaces=_pairs(
        "nurse=a hospital, librarian=a library, banker=a bank, mechanic=a garage, astronaut=a spaceship, "
        "priest=a church, professor=a college, cashier=a supermarket"
    ),
    materials=_table(
        """
        wood: table bench cupboard
        steel: key chain coin
        rubber: tire eraser balloon
        cotton: towel bandage t-shirt
        stone: statue tombstone
        plastic: toothbrush bag
        """
    ),
    young=_pairs("dog=puppy, sheep=lamb, bear=cub, hen=chick, frog=tadpole, butterfly=caterpillar"),
    sounds=_pairs("dog=bark, sheep=bleat, lion=roar, bee=buzz, snake=hiss, wolf=howl"),
    homes=_pairs("bee=a hive, spider=a web, rabbit=a burrow, bear=a cave, dog=a kennel, ant=an anthill"),
)
