"""Words for keys and lists: common English ones, and made-up ones where a list needs more."""

import random
from functools import cache

_ADJECTIVES = """
    able absent active actual adult agile alert alive amber ample ancient angry annual anxious apt arid ashen aware
    awful bald bare basic bitter blank bleak blind blond blue blunt bold bored brave brief bright brisk broad broken
    bronze brown bulky busy calm careful casual central charming cheap cheerful chief chilly civil classic clean clear
    clever cloudy clumsy coarse cold comic common compact complex cool coral costly crisp crooked crucial cruel curious
    curly current daily damp daring dark dear deep delicate dense direct distant dizzy double drab dry dull dusty eager
    early earnest eastern easy elastic elder elegant empty equal eternal even exact exotic expert fair faint false
    famous fancy fast fatal fertile fierce final fine firm fit flat fluid foggy foreign formal fragile free fresh
    frequent friendly frozen full funny gentle giant glad global gloomy golden good graceful grand grateful gray great
    greedy green grim guilty handy happy hard harsh hasty healthy heavy helpful hidden high hollow honest hot huge
    humble hungry icy ideal idle ill inner jolly joyful juicy keen kind known large late lazy lean legal level light
    likely liquid little lively local lone long loose loud lovely low loyal lucky lunar mad main major marine massive
    mature mellow merry mighty mild minor misty mobile modern modest moist mute mutual naive naked narrow native neat
    nervous new nice nimble noble noisy normal northern novel oblong odd old open orange outer oval pale patient
    peaceful perfect plain pleasant plump polite poor popular precious pretty prime private proper proud public pure
    purple quaint quick quiet rapid rare raw ready real recent red regal regular remote rich rigid ripe robust rosy
    rotten rough round royal rude rural rusty sacred sad safe salty scarce secret secure senior serene severe shallow
    sharp shiny short shy sick silent silky silly silver simple sincere single sleek sleepy slender slim slow small
    smart smooth sober soft solar solid sore sour southern sparse spicy square stable stale steady steep sticky stiff
    still stormy stout strange strict strong sturdy subtle sudden sunny super sweet swift tall tame tart tasty tender
    tense thick thin thirsty tidy tight tiny tired tough tranquil tropical true ugly unique upper upset urban urgent
    useful usual vague vain valid vast violet vital vivid warm wary weak wealthy weary western wet white whole wicked
    wide wild willing windy wise witty wooden worthy yearly yellow young zealous
    """
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())

_NOUNS = """
    acorn actor airport album alley almond anchor ankle answer apple apron arch arena arm arrow artist atlas attic
    aunt author autumn avenue axis bakery balloon banana band bank banner barn barrel basin basket battle beach beacon
    beak beam bean bear beard beast bed beetle bell belt bench berry bicycle bird blade blanket blossom board boat body
    bone book boot border bottle boulder bow bowl box bracelet branch bread breeze brick bridge broom brother brush
    bubble bucket building bull bundle bush butter button cabin cable cactus cage cake camel camera camp canal candle
    canoe canvas canyon cap captain caravan card cargo carpet carrot castle cat cave ceiling cello chain chair chalk
    channel chapel chapter cheese cherry chest chicken child chimney chin choir circle circus citizen city clay cliff
    clock cloth cloud clover club coach coast coat cobweb coin collar colony comb comet compass copper corn corner
    cotton couch council country cousin cow crab cradle crane crater crayon creek crew cricket crop crow crowd crown
    crystal cup curtain cushion cylinder dance daughter dawn deer dentist desert desk diamond diary dinner dish doctor
    doll dolphin donkey door dove dragon drawer dream dress drum duck eagle ear earth echo edge eel egg elbow elephant
    elevator elk engine envelope evening eye fabric face factory falcon family farm farmer feather fence fern ferry
    festival fiddle field fig finger fire fish flag flame flask flock flood floor flower flute fog forest fork fossil
    fountain fox frame friend frog fruit funnel galaxy gallery game garage garlic gate gazelle giraffe girl glacier
    glass glove goat goblet goose grain grape grass grove guard guest guitar gull hammer hamster hand harbor harp hat
    hawk heart hedge helmet hen hero heron hill hinge honey hood hoof hook horn horse hospital hotel hour house hut
    ink insect island ivory ivy jacket jar jaw jelly jewel journey judge jug jungle kangaroo kettle key king kite
    kitten knee knife knight knot ladder lake lamb lamp lantern lawn lawyer leaf leather lemon leopard lesson letter
    library lighthouse lily lime linen lion lizard llama lobster lock log lunch lung magnet mammal mango map maple
    marble market mask mast meadow melody melon merchant mermaid metal meteor milk mill mirror mitten monkey month moon
    morning moss moth mother motor mountain mouse mouth mud muffin museum mushroom music mustard nail napkin neck
    needle nephew nest net night nose notebook number nurse nut oak oar oasis ocean octopus office olive onion opera
    orbit orchard orchid organ ostrich otter oven owl oyster paddle page paint palace palm panda paper parade parcel
    park parrot passage pasture patch path peach peacock pear pearl pebble pelican pen pencil penguin pepper piano
    picture pie pigeon pillow pilot pine pirate planet plant plate plaza plow plum pocket poem poet pole pond pony
    porch port portrait potato powder prairie prince prize puddle pump puppet puppy puzzle pyramid quail quarry queen
    quilt rabbit radio radish raft rain rainbow ranch raven recipe reef ribbon rice ring river road robe robin rocket
    roof room rooster root rope rose ruby rug sail sailor salad salmon sand sandal sauce saucer scarf school scissors
    sculpture sea seal season seed shadow shark shed sheep shelf shell ship shirt shoe shore shoulder shovel sister
    skate sky sled sleeve slope snail snake snow soap sock sofa soil soldier song soup spade sparrow spear spider spoon
    spring squirrel stable stadium stage stair stamp star statue steam stem stone stool storm story stove straw stream
    street string student sugar suitcase summer sun swamp swan sweater table tail tailor tank tea teacher temple tent
    theater thimble thorn thread throne thumb thunder ticket tiger tile toad toast tomato tongue tooth torch tortoise
    towel tower town toy tractor train tray treasure tree triangle trombone trousers truck trumpet trunk tulip tunnel
    turkey turnip turtle twig umbrella uncle valley van vase vessel village vine violin volcano voyage wagon waist
    wall walnut walrus wasp watch water wave wax wheat wheel whistle wife willow window wing winter wizard wolf woman
    wool worm wrist yacht yard zebra
    """
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())

_VERBS = """
    accept admire admit advise afford agree allow announce appear applaud argue arrange arrive ask attach attempt
    attend bake balance bathe become beg begin behave believe bend bless blink boast boil borrow bounce breathe build
    burn bury buy calculate carry carve catch celebrate chase chew choose claim climb collect compare complain compose
    confess confuse consider cook copy cough count create cross cry cure decide decorate deliver depend describe deserve
    destroy develop disagree discover divide doubt drag drift drink drive earn eat educate employ enjoy enter escape
    examine excite exist expand expect explain explore fetch fill fix float flow fly fold follow forget forgive gather
    gaze give glow grab greet grow guess guide happen hatch hate haunt heal hear help hesitate hide hope hug hurry
    imagine improve include increase inform invent invite join juggle jump kneel knit knock know laugh launch learn
    leave lend listen live lose love manage march marry measure meet melt mend mix move multiply notice obey observe
    obtain offer open ordain owe paddle pause perform permit persuade polish ponder practice praise pray prefer prepare
    pretend prevent produce promise protect prove provide pull punish push realize receive recognize reduce refuse
    regret reject relax rely remain remember remind remove repair repeat replace reply rescue retire return ride rinse
    roar scatter scold scrape scratch scream seek sell send shake shave shiver shout shrug sing sink sit skip sleep slip
    smile sneeze solve speak spell spend spill squeeze start stay steal stir stretch study succeed suffer suggest
    supply suppose surprise surround swim swing talk teach tell tempt think throw tickle travel tremble trust try twist
    understand unite unlock untie vanish visit wait wake walk wander warn wash waste weave weigh welcome whisper wonder
    worry wrestle write yawn yell
    """
VERBS: tuple[str, ...] = tuple(_VERBS.split())

_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gl", "kr", "pl")
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "l", "m", "n", "r", "s", "t", "x")


@cache
def english_words() -> tuple[str, ...]:
    """Every adjective, noun and verb once, in alphabetical order."""
    return tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))


class WordStream:
    """Distinct words without end, drawn as far as they are read: the English ones shuffled, then made-up ones.

    Args:
        seed: of the order; equal seeds give equal streams.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._words = list(english_words())
        self._random.shuffle(self._words)
        self._known = set(self._words)

    def first(self, count: int) -> list[str]:
        """The first ``count`` words; the same however far the stream was read before."""
        while len(self._words) < count:
            word = self._made_up()
            if word not in self._known:
                self._known.add(word)
                self._words.append(word)
        return self._words[:count]

    def _made_up(self) -> str:
        syllables = self._random.choice((2, 3, 3))
        draw = self._random.choice
        return "".join(draw(_ONSETS) + draw(_NUCLEI) + draw(_CODAS) for _ in range(syllables))
