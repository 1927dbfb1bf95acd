"""The things of the scenes: what they are called. They are drawn from the sprites of Noto Emoji (sprites.py)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """What a thing is also called: by its family, where a caption names no kind, and by another name."""

    family: str
    other: str | None = None


# In the order of the sprites in sprites.webp.
THINGS: dict[str, Thing] = {
    "cat": Thing("animal", "kitten"), "dog": Thing("animal", "puppy"), "fox": Thing("animal"), "lion": Thing("animal"),
    "tiger": Thing("animal"), "cow": Thing("animal"), "pig": Thing("animal"), "frog": Thing("animal", "toad"),
    "monkey": Thing("animal"), "bear": Thing("animal"), "panda": Thing("animal"), "koala": Thing("animal"),
    "rabbit": Thing("animal", "bunny"), "mouse": Thing("animal"), "wolf": Thing("animal"), "unicorn": Thing("animal"),
    "chicken": Thing("animal", "hen"), "penguin": Thing("animal"), "bird": Thing("animal"), "duck": Thing("animal"),
    "owl": Thing("animal"), "eagle": Thing("animal"), "flamingo": Thing("animal"), "bat": Thing("animal"),
    "bee": Thing("animal", "honeybee"), "butterfly": Thing("animal"), "snail": Thing("animal"),
    "ladybug": Thing("animal", "ladybird"), "turtle": Thing("animal", "tortoise"), "snake": Thing("animal"),
    "octopus": Thing("animal"), "crab": Thing("animal"), "tropical fish": Thing("animal"), "whale": Thing("animal"),
    "dolphin": Thing("animal"), "shark": Thing("animal"), "sheep": Thing("animal"), "elephant": Thing("animal"),
    "giraffe": Thing("animal"), "zebra": Thing("animal"), "kangaroo": Thing("animal"), "hedgehog": Thing("animal"),
    "dinosaur": Thing("animal", "brontosaurus"), "t-rex": Thing("animal", "tyrannosaurus"), "apple": Thing("food"),
    "banana": Thing("food"), "cherries": Thing("food"), "grapes": Thing("food"), "watermelon": Thing("food"),
    "lemon": Thing("food"), "pineapple": Thing("food"), "strawberry": Thing("food"), "avocado": Thing("food"),
    "carrot": Thing("food"), "corn": Thing("food", "maize"), "mushroom": Thing("food", "toadstool"),
    "bread": Thing("food"), "cheese": Thing("food"), "egg": Thing("food"), "hamburger": Thing("food", "burger"),
    "pizza": Thing("food"), "cake": Thing("food", "birthday cake"), "cookie": Thing("food"),
    "ice cream": Thing("food"), "coffee": Thing("food", "cup of coffee"), "donut": Thing("food", "doughnut"),
    "taco": Thing("food"), "sushi": Thing("food"), "car": Thing("vehicle"), "bus": Thing("vehicle"),
    "fire engine": Thing("vehicle", "fire truck"), "bicycle": Thing("vehicle", "bike"),
    "train": Thing("vehicle", "steam train"), "airplane": Thing("vehicle", "plane"), "rocket": Thing("vehicle"),
    "sailboat": Thing("vehicle", "boat"), "helicopter": Thing("vehicle"), "tractor": Thing("vehicle"),
    "ufo": Thing("vehicle", "flying saucer"), "castle": Thing("building"), "tent": Thing("building"),
    "pine tree": Thing("plant", "fir tree"), "palm tree": Thing("plant", "palm"), "cactus": Thing("plant"),
    "sunflower": Thing("plant"), "tulip": Thing("plant"), "rose": Thing("plant"), "sun": Thing("object"),
    "rainbow": Thing("object"), "volcano": Thing("object"), "umbrella": Thing("object"), "snowman": Thing("object"),
    "snowflake": Thing("object"), "fire": Thing("object", "flame"), "guitar": Thing("object"), "drum": Thing("object"),
    "trumpet": Thing("object"), "violin": Thing("object"), "soccer ball": Thing("object", "football"),
    "basketball": Thing("object"), "gift": Thing("object", "present"), "balloon": Thing("object"),
    "books": Thing("object"), "alarm clock": Thing("object", "clock"), "key": Thing("object"),
    "light bulb": Thing("object", "lamp"), "chair": Thing("object"), "top hat": Thing("object", "hat"),
    "glasses": Thing("object"), "sneaker": Thing("object", "shoe"), "camera": Thing("object"),
    "telephone": Thing("object", "phone"), "television": Thing("object", "tv"), "hammer": Thing("object"),
    "anchor": Thing("object"), "trophy": Thing("object"), "bell": Thing("object"),
    "gem": Thing("object", "jewel"), "smiley": Thing("face", "smiley face"), "clown": Thing("face"),
    "santa": Thing("face", "santa claus"), "robot": Thing("face"), "ghost": Thing("face"), "alien": Thing("face"),
    "pumpkin": Thing("face", "jack-o-lantern"), "skull": Thing("face"),
}  # fmt: skip

WITHOUT_ARTICLE = {"cherries", "grapes", "corn", "bread", "cheese", "ice cream", "coffee", "sushi", "fire", "books",
                   "glasses"}  # fmt: skip
# The colours that a thing has by nature, or that it would look the same in: it is not recoloured to these. The first is
# what people call it: "a red apple" is an apple as it is.
NATURAL_COLOURS = {
    thing: tuple(colours.split())
    for thing, colours in {
        "bell": "yellow", "key": "yellow", "trumpet": "yellow", "cat": "orange yellow", "smiley": "yellow",
        "sun": "yellow", "zebra": "gray", "lemon": "yellow", "telephone": "red", "basketball": "orange",
        "bat": "brown", "pumpkin": "orange", "taco": "yellow", "dolphin": "blue cyan", "cookie": "brown orange yellow",
        "bear": "brown", "avocado": "green yellow lime", "castle": "gray", "frog": "green lime", "dog": "brown pink",
        "snail": "brown orange", "tent": "orange", "bicycle": "gray", "bread": "brown orange yellow", "robot": "gray",
        "trophy": "yellow orange", "fire": "orange red", "pine tree": "green", "balloon": "red", "koala": "gray",
        "tiger": "orange", "cactus": "green lime", "flamingo": "pink", "dinosaur": "green", "shark": "gray",
        "eagle": "brown", "fox": "orange", "top hat": "black brown", "t-rex": "green lime", "bird": "blue cyan",
        "wolf": "gray", "panda": "black gray", "soccer ball": "black gray", "penguin": "black gray", "ladybug": "red",
        "rose": "red", "cheese": "yellow", "camera": "gray black", "light bulb": "yellow", "monkey": "brown orange",
        "hamburger": "brown orange yellow", "grapes": "purple", "snake": "green lime", "violin": "brown orange",
        "whale": "blue cyan gray", "owl": "brown orange", "hedgehog": "brown", "egg": "brown orange",
        "crab": "orange red", "palm tree": "green brown", "mouse": "gray", "sneaker": "blue cyan", "alien": "gray",
        "helicopter": "yellow", "pizza": "yellow orange", "apple": "red orange", "chair": "brown orange",
        "anchor": "gray cyan", "fire engine": "red", "television": "green blue", "giraffe": "orange yellow",
        "octopus": "red orange pink", "donut": "brown", "tulip": "pink", "butterfly": "blue cyan",
        "kangaroo": "brown orange", "ufo": "gray", "turtle": "green lime", "pig": "pink", "hammer": "gray",
        "airplane": "blue cyan gray", "pineapple": "yellow", "corn": "yellow", "cherries": "red", "glasses": "brown",
        "alarm clock": "red", "umbrella": "purple blue", "carrot": "orange", "lion": "orange brown",
        "tractor": "green", "car": "red", "strawberry": "red", "elephant": "gray", "sailboat": "orange",
        "snowflake": "blue cyan", "gem": "blue cyan", "snowman": "gray", "skull": "gray", "ghost": "gray",
        "gift": "red orange", "guitar": "red", "drum": "red", "rabbit": "gray", "bus": "gray", "sheep": "black gray",
        "chicken": "gray", "unicorn": "gray", "cow": "gray", "duck": "brown", "volcano": "brown red",
        "sushi": "orange", "train": "gray",
    }.items()
}  # fmt: skip
