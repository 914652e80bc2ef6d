"""The built-in data set: a small world of creatures, drawn by code. No download, all annotated.

    out = toy.draw(torch.arange(64), "train", annotate=True)   # out["image"]: (64, 3, 64, 64) uint8

Every part of every creature is one shape, a *spindle*: an axis that may bend, with a radius at its
root, middle and tip. A sausage, an egg, a horn, a leaf and a ball are spindles. The distance of a
pixel to one takes a dozen operations, gives edges without stairs, and serves a whole batch at once.
A class is a combination of part shapes (BESTIARY, built from SHAPES) and nothing else: coat, pose,
side, turn, size, place, light, clutter and what stands in front are drawn from the same
distributions for all classes. A creature is a tree of bones (legs hang on the torso, ears on the
head); each bone swings, so a still is one moment of a walk and a video is the walk. Coats are
marbled in all colours, a little brighter than the grey scenery, so that a person finds a creature
at a glance, while the colours of an image as a whole tell no classes and raw pixels tell some
(their nearest neighbours: 26 %, by cosine about the mean picture 53 %; chance is 6): what is left
to learn is shape. Pictures are functions of (seed, split, index) alone (rng.py), in a frame of
[-1, 1] x [-1, 1]: another size is the same picture with other pixels.

    python toy.py            # writes out/toy.png: all classes, scenes with their annotation, a film
"""
import argparse
import math
import os

import torch
import torch.nn.functional as F

from lib import rng

# B images, K creatures of an image, J bones of a creature, P parts, T frames, S pixels a side

# ---- anatomy -------------------------------------------------------------------------------------

NEXT = -1.0        # in the column `at`: this bone starts where the one above it ends
SHAPES = {         # lengths: 1 is about a body. Angles: 0 forward, 90 down, -90 up, 180 back
    # at: place on the axis of the bone it hangs on; bend: how far the tip leaves it, in lengths
    #            at   angle  length  radius: root, middle, tip   bend
    "torso": {
        "barrel":  [(0,     0,  .75,  .21, .23, .24,   0)],
        "egg":     [(0,   -25,  .40,  .28, .29, .21,   0)],
        "long":    [(0,     0,  .90,  .15, .20, .17,   0)],
        "slug":    [(0,     0, 1.05,  .03, .09, .11,   0)],
        "pear":    [(0,   -25,  .50,  .08, .25, .19,   0)],
        "boat":    [(0,     0,  .70,  .08, .25, .21, -.1)],
        "spindle": [(0,     0,  .80,  .03, .33, .20,   0)],
        "torpedo": [(0,     0, 1.35,  .03, .24, .17,   0)],
        "ball":    [(0,   -10,  .20,  .38, .38, .32,   0)],
        "waist":   [(0,    -8,  .80,  .23, .05, .14,   0)],
        "rod":     [(0,   -55,  .70,  .03, .09, .08,   0)],
        "mite":    [(0,   -60,  .28,  .12, .18, .15,   0)]},
    "neck": {
        "none":    [(1,     0,  .05,  .08, .08, .08,   0)],
        "short":   [(1,   -45,  .20,  .15, .14, .13,   0)],
        "stretch": [(1,   -30,  .42,  .12, .09, .09,   0)],
        "tall":    [(1,   -68,  .95,  .15, .09, .08,   0)],
        "swan":    [(1,   -95,  .65,  .10, .06, .05,  .3)]},
    "head": {
        "ball":    [(1,     0,  .06,  .21, .22, .20,   0)],
        "bead":    [(1,     0,  .05,  .13, .14, .13,   0)],
        "wedge":   [(1,    18,  .34,  .15, .14, .07,   0)],
        "dome":    [(1,    30,  .14,  .25, .24, .19,   0)],
        "bullet":  [(.8,    0,  .20,  .20, .18, .08,   0)]},
    "ear": {     # the far one, then the near one
        "pointed": [(.9,  -70,  .36,  .13, .07, .01,   0), (.1, -115,  .36,  .13, .07, .01,   0)],
        "long":    [(.9,  -82,  .68,  .05, .09, .04,   0), (.1, -112,  .68,  .05, .09, .04,   0)],
        "flap":    [(.2,  -80,  .26,  .12, .18, .12,   0), (.0,  150,  .34,  .12, .24, .20,   0)],
        "horn":    [(.3,  -90,  .34,  .05, .04, .01, -.3), (.0, -112,  .34,  .05, .04, .01, -.3)],
        "feeler":  [(.9,  -45,  .42,  .03, .025, .06, .2), (.5,  -80,  .42,  .03, .025, .06,  .2)]},
    "snout": {
        "beak":    [(1,    12,  .40,  .12, .05, .00,   0)],
        "bill":    [(1,     5,  .40,  .09, .06, .08, -.1), (1, 30, .28, .07, .05, .05, 0)],
        "dagger":  [(1,    10,  .62,  .08, .04, .00,   0)],
        "trunk":   [(1,    62,  .46,  .12, .09, .08,  .1), (NEXT, 70, .38, .08, .07, .06, -.5)],
        "jaws":    [(.7,   -4,  .48,  .11, .08, .07,   0), (.5, 26, .48, .09, .05, .03, 0)]},
    "leg": {     # the legs of one side, hind to front
        "paw":     [(.10,  92,  .32,  .12, .09, .07,   0), (NEXT,  85, .24, .07, .06, .07, 0),
                    (.92,  88,  .32,  .11, .08, .07,   0), (NEXT,  92, .24, .07, .06, .07, 0)],
        "pillar":  [(.05,  90,  .36,  .14, .12, .11,   0), (NEXT,  90, .24, .11, .11, .12, 0),
                    (.95,  90,  .36,  .14, .12, .11,   0), (NEXT,  90, .24, .11, .11, .12, 0)],
        "stilt":   [(.05,  93,  .48,  .11, .07, .05,   0), (NEXT,  88, .46, .05, .04, .06, 0),
                    (.95,  87,  .48,  .11, .07, .05,   0), (NEXT,  92, .46, .05, .04, .06, 0)],
        "hop":     [(.10,  55,  .30,  .17, .15, .08,   0), (NEXT,  15, .28, .07, .06, .05, 0),
                    (.90,  80,  .32,  .09, .07, .05,   0), (NEXT,  40, .14, .05, .05, .05, 0)],
        "stub":    [(.12, 115,  .30,  .11, .09, .07,   0), (NEXT,  25, .12, .06, .06, .05, 0),
                    (.88,  65,  .30,  .11, .09, .07,   0), (NEXT,  25, .12, .06, .06, .05, 0)],
        "wader":   [(.35, 100,  .50,  .09, .04, .04,   0), (NEXT,  82, .42, .04, .03, .03, 0),
                    (NEXT,  8,  .20,  .04, .03, .02,   0)],
        "web":     [(.45,  92,  .38,  .07, .04, .04,   0), (NEXT,  10, .20, .04, .06, .07, 0)],
        "six":     [(.35, 125,  .62,  .04, .03, .025, -.3), (.60,  90, .55, .04, .03, .025, 0),
                    (.85,  55,  .62,  .04, .03, .025,  .3)],
        "eight":   [(.00, 190,  .68,  .06, .05, .03, -.8), (.20, 220, .78, .06, .05, .03, -1.1),
                    (.80, -40,  .78,  .06, .05, .03, 1.1), (1.0, -10, .68, .06, .05, .03,  .8)]},
    "wing": {
        "feather": [(.80, 165,  .62,  .10, .17, .02, -.1), (.70, 185,  .48,  .08, .15, .02,   0)],
        "leather": [(.80, -100, .85,  .06, .10, .01, -.5), (.60, -150, .80,  .07, .22, .01, -.2)],
        "leaf":    [(.85, -100, .75,  .02, .30, .20,   0), (.50, 165,  .55,  .02, .24, .18,   0)]},
    "tail": {
        "whip":    [(0,  205,  .50,  .06, .045, .04,  .2), (NEXT, 250, .30, .04, .04, .04, .3)],
        "puff":    [(0,  190,  .18,  .13, .15, .14,    0)],
        "string":  [(0,  120,  .42,  .03, .025, .05,   0)],
        "thick":   [(0,  165,  .45,  .15, .12, .08,  .05), (NEXT, 195, .45, .08, .06, .00, .3)],
        "fan":     [(.1, 190,  .46,  .07, .10, .10,    0), (.1, 165, .42, .06, .09, .09, 0)],
        "stump":   [(0,  165,  .24,  .09, .06, .00,    0)],
        "fork":    [(.05, 225, .60,  .05, .13, .01,    0), (.05, 135, .60, .05, .13, .01, 0)],
        "crescent": [(.02, 240, .62, .08, .08, .00,   .2), (.02, 125, .46, .07, .06, .00, -.2)]},
    "fin": {     # two on the back, behind the torso; one on the side, before it
        "round":   [(.65, -110, .50,  .14, .14, .08,   0), (.35, -130, .34, .12, .10, .06, 0),
                    (.65,  135, .28,  .05, .09, .05,   0)],
        "blade":   [(.55, -118, .64,  .18, .09, .00, -.1), (.20, -135, .22, .07, .04, .00, 0),
                    (.65,  120, .50,  .10, .08, .00,  .1)],
        "spikes":  [(.70, -105, .34,  .12, .06, .00,   0), (.30, -105, .34, .12, .06, .00, 0)]},
    "shell": {
        "dome":    [(-.02, -6,  .95,  .12, .38, .12,   0)],
        "coil":    [(.35, -95,  .28,  .36, .36, .36,   0)]},
    "eye": {     # white and pupil: everybody has the same
        "round":   [(.50, -75,  .07,  .07, .07, .07,   0), (NEXT, 0, .03, .04, .04, .04, 0)]}}

BESTIARY = {     # what tells the classes apart, all of it: the shapes of their parts
    "cat": dict(torso="barrel", head="ball", ear="pointed", leg="paw", tail="whip"),
    "rabbit": dict(torso="egg", head="ball", ear="long", leg="hop", tail="puff"),
    "elephant": dict(torso="barrel", head="dome", ear="flap", snout="trunk", leg="pillar",
                     tail="string"),
    "giraffe": dict(torso="barrel", neck="tall", head="wedge", ear="horn", leg="stilt",
                    tail="string"),
    "crocodile": dict(torso="long", head="wedge", snout="jaws", leg="stub", tail="thick",
                      fin="spikes"),
    "turtle": dict(torso="long", neck="stretch", head="bead", leg="stub", tail="stump",
                   shell="dome"),
    "snail": dict(torso="slug", head="bead", ear="feeler", shell="coil"),
    "duck": dict(torso="boat", head="ball", snout="bill", leg="web", wing="feather", tail="stump"),
    "stork": dict(torso="pear", neck="swan", head="bead", snout="dagger", leg="wader",
                  wing="feather", tail="fan"),
    "fish": dict(torso="spindle", neck="none", head="bullet", tail="fork", fin="round"),
    "shark": dict(torso="torpedo", neck="none", head="wedge", tail="crescent", fin="blade"),
    "bat": dict(torso="mite", head="ball", ear="pointed", wing="leather"),
    "butterfly": dict(torso="rod", neck="none", head="bead", ear="feeler", wing="leaf"),
    "ant": dict(torso="waist", neck="none", head="bead", ear="feeler", leg="six"),
    "spider": dict(torso="ball", neck="none", head="bead", leg="eight"),
    "dragon": dict(torso="barrel", neck="tall", head="wedge", ear="horn", leg="paw", wing="leather",
                   tail="thick", fin="spikes")}
CLASSES = list(BESTIARY)
PARTS = ["torso", "head", "ear", "snout", "leg", "wing", "tail", "fin", "shell"]   # id: 1, 2, ...
KEYPOINTS = PARTS                                                                  # one for each
NUM_IMAGES = {"train": 20000, "test": 2000}

# The bones of any creature, parents before children: shape, row of it, number of the parent.
SKELETON = [("torso", 0, 0), ("neck", 0, 0), ("head", 0, 1), ("eye", 0, 2), ("eye", 1, 2),
            ("ear", 0, 2), ("ear", 1, 2), ("snout", 0, 2), ("snout", 1, 2),
            *[("leg", i, 0) for i in (0, 1, 2, 3)] * 2, *[("wing", i, 0) for i in (0, 1)] * 2,
            *[("tail", i, 0) for i in (0, 1)], *[("fin", i, 0) for i in (0, 1, 2)], ("shell", 0, 0)]
LAYERS = [     # how they are painted, back to front: shape, bones from, to, brightness
    ("wing", 17, 19, 0.75), ("leg", 9, 13, 0.75), ("tail", 21, 23, 1), ("fin", 23, 25, 1),
    ("ear", 5, 6, 0.75), ("torso", 0, 2, 1), ("shell", 26, 27, 1), ("leg", 13, 17, 1),
    ("head", 2, 3, 1), ("snout", 7, 9, 1), ("fin", 25, 26, 1), ("ear", 6, 7, 1),
    ("wing", 19, 21, 1), ("eye", 3, 4, 0.97), ("eye", 4, 5, 0.06)]          # white, pupil
EYES = 13                                                            # the first of their layers
CENTRE = [(0, 0.45), (2, 0.3), (6, 0.7), (7, 0.7), (13, 0.7),        # key-points: bone, place on it
          (19, 0.6), (21, 0.7), (23, 0.85), (26, 0.5)]
SWING = dict(torso=2, neck=4, head=4, eye=0, ear=6, snout=2, leg=9, wing=10, tail=7, fin=5,
             shell=1)                                                # degrees to each side
FAR = {9: 8, 10: 8, 11: 8, 12: 8, 17: 38, 18: 22}                   # far limbs stand apart, degrees
CLUTTER, FRONT = 6, 2                                                # things behind and before


def _anatomy():
    """(classes, J, 7) rows of SHAPES, zeros where a class has no such bone."""
    table = torch.zeros(len(CLASSES), len(SKELETON), 7, dtype=torch.float64)
    for c, creature in enumerate(BESTIARY.values()):
        for j, (shape, row, _) in enumerate(SKELETON):
            rows = SHAPES[shape].get({"neck": "short", "eye": "round", **creature}.get(shape), [])
            if row < len(rows):
                table[c, j] = torch.tensor(rows[row])
                table[c, j, 1] += FAR.get(j, 0) * (rows[row][0] != NEXT)
    return table


ANATOMY = _anatomy()

# ---- pose: bones -> spindles ---------------------------------------------------------------------

X, Y, COS, SIN, SIDE, LENGTH, R0, R1, R2, BEND = range(10)    # radius at t: R0 + R1 t + R2 t^2


def axis(s, t):
    """Point on the axis of spindles (..., 10) at t (0 the root, 1 the tip) -> x, y."""
    along, across = s[..., LENGTH] * t, s[..., SIDE] * s[..., BEND] * t * t
    return (s[..., X] + s[..., COS] * along - s[..., SIN] * across,
            s[..., Y] + s[..., SIN] * along + s[..., COS] * across)


def skeleton(cls, u, time):
    """(B,) classes, (B, J, 4) uniform numbers, (B,) time -> (B, J, 10) spindles, facing right.

    A bone that swings takes its children along: ear with head, head with neck."""
    rest = ANATOMY.to(cls.device)[cls]
    out, turn = rest.new_zeros(*rest.shape[:2], 10), torch.zeros_like(rest[..., 0])
    swing = torch.tensor([SWING[shape] for shape, *_ in SKELETON], device=cls.device)
    swing = swing * (2 * math.pi * (u[..., 0] + 2 * time[:, None])).sin()       # two strides a film
    for j, (shape, _, parent) in enumerate(SKELETON):
        at, angle, length, root, middle, tip, bend = rest[:, j].unbind(-1)
        chained = at == NEXT
        above = torch.where(chained[:, None], out[:, j - 1], out[:, parent])   # zeros for the torso
        turn[:, j] = swing[:, j] + torch.where(chained, turn[:, j - 1], turn[:, parent])
        x, y = axis(above, torch.where(chained, 1, at))
        angle = (angle + turn[:, j]) * (math.pi / 180)
        length, fat = length * (0.88 + 0.24 * u[:, j, 1]), 0.9 + 0.2 * u[:, j, 2]
        bend = (bend + 0.3 * (u[:, j, 3] - 0.5) * (SWING[shape] > 5)) * length
        out[:, j] = torch.stack([
            x, y, angle.cos(), angle.sin(), torch.ones_like(x), length, root * fat,
            (4 * middle - 3 * root - tip) * fat, 2 * (root + tip - 2 * middle) * fat, bend], -1)
    return out


def extent(s):
    """(B, J, 10) spindles -> (B, 2) low and high corner of the box that holds them."""
    t = torch.tensor([0, 0.5, 1], device=s.device, dtype=s.dtype)
    xy = torch.stack(axis(s[:, :, None], t), -1)                                # (B, J, 3, 2)
    radius = (s[..., R0, None] + s[..., R1, None] * t + s[..., R2, None] * t * t)[..., None]
    none = (s[..., LENGTH] == 0)[..., None, None]
    return ((xy - radius).masked_fill(none, math.inf).amin((1, 2)),
            (xy + radius).masked_fill(none, -math.inf).amax((1, 2)))


def move(s, scale, mirror, angle, shift):
    """Scale, mirror (1 or -1), rotate (radians), shift (B, 2) spindles (B, J, 10), in turn."""
    scale, mirror, angle = scale[:, None], mirror[:, None], angle[:, None]

    def rotate(x, y):
        return (angle.cos() * mirror * x - angle.sin() * y,
                angle.sin() * mirror * x + angle.cos() * y)

    x, y = rotate(s[..., X] * scale, s[..., Y] * scale)
    sizes = s[..., LENGTH:] * scale[..., None]
    return torch.stack([x + shift[:, :1], y + shift[:, 1:], *rotate(s[..., COS], s[..., SIN]),
                        s[..., SIDE] * mirror, *sizes.unbind(-1)], -1)


# ---- world: numbers -> everything there is to see, no pixels yet ---------------------------------


def between(low, high, u):
    return low + (high - low) * u


def colour(u, saturation=(0, 1), value=(0, 1)):
    """(..., 3) uniform numbers -> (..., 3) RGB with hue, saturation and value in these limits."""
    k = (u[..., :1] * 6 + torch.tensor([5.0, 3.0, 1.0], device=u.device)) % 6
    s, v = between(*saturation, u[..., 1:2]), between(*value, u[..., 2:])
    return v * (1 - s * torch.minimum(k, 4 - k).clamp(0, 1))


def creatures(number, kind, time):
    """Who is there, how and where -> classes (B, K), spindles (B, K, J, 10), absent (B, K, J),
    centre (B, K, 2), half of the longer side (B, K), angle and mirror (B, K), drift (B, 1, 2)."""
    K = {"single": 1, "scene": 4, "film": 3}[kind]
    u, pose = number("creature", K, 16), number("pose", K, len(SKELETON), 4)
    cls = (u[..., 0] * len(CLASSES)).long()
    mirror = torch.where(u[..., 1] < 0.5, -1.0, 1.0).double()
    angle = between(-0.15, 0.15, u[..., 2])                                     # 9 degrees
    order = torch.arange(K, device=cls.device)                                  # far to near
    if kind == "single":
        count, size = 1, between(0.75, 0.98, u[..., 3])
        start = between(-1.15, 1.15, u[..., 4:6]) * (1 - size[..., None]).clamp(min=0.18)
        end = start
    else:
        count = 2 + (number("count", 1) * (K - 1)).floor()                      # (B, 1): 2 to K
        depth = order / (count - 1)
        size = between(0.34, 0.46, u[..., 3]) + 0.16 * depth                    # nearer is larger
        x = (u[:, :1, 4] + 0.618 * order) % 1 * 1.3 - 0.65                     # spread, may overlap
        y = between(-0.38, -0.18, u[..., 5]) + 0.6 * depth                      # and lower
        start = end = torch.stack([x, y], -1)
    if kind == "film":                                                          # two change sides
        side = torch.where(u[:, :1, 6] < 0.5, -1.0, 1.0)
        place = torch.tensor([[-0.6, 0.6, 0.0], [0.6, -0.6, 0.45]], device=cls.device)
        start, end = [torch.stack([side * p + 0.12 * u[..., 7] - 0.06, y], -1) for p in place]
        mirror, angle = (end - start)[..., 0].sign(), angle * 0.5               # walk forward
    when, flat = time.repeat_interleave(K), (mirror.flatten(), angle.flatten())
    cls_, pose = cls.flatten(), pose.flatten(0, 1)                             # (B K,), (B K, J, 4)
    still = skeleton(cls_, pose, torch.zeros_like(when))
    low, high = extent(move(still, torch.ones_like(when), *flat, torch.zeros_like(still[:, 0, :2])))
    scale = size.flatten() / ((high - low) / 2).amax(1)                      # all classes fit alike
    drift = between(-0.25, 0.25, number("drift", 2))[:, None] * time[:, None, None]   # the camera's
    centre = start + (end - start) * time[:, None, None] + drift
    shift = centre.flatten(0, 1) - (low + high) / 2 * scale[:, None]
    bones = move(skeleton(cls_, pose, when), scale, *flat, shift).unflatten(0, cls.shape)
    absent = (bones[..., LENGTH] == 0) | (order >= count)[..., None]
    bones[..., LENGTH].masked_fill_(absent, 1)
    bones[..., R0].masked_fill_(absent, -9)                                     # reaches no pixel
    cls = torch.where(order < count, cls, -1)
    return cls, bones, absent, centre, size, angle, mirror, drift


def coats(number, centre, size, angle, mirror):
    """Marbled coats (B, K, 3, 28, 28), and their own coordinates as planes (B, K, 2, 3): a coat
    moves with its creature. Its pattern is too fine to tell images apart. On average it is a little
    brighter than the scenery: a hidden patch can be guessed, and pixels tell few classes."""
    coat = 0.65 + 2.2 * (number("coat", size.shape[1], 3, 28, 28) - 0.5)
    grain = between(0.5, 0.9, number("grain", size.shape[1])) / size            # coarse to fine
    along, across = grain * angle.cos(), grain * angle.sin()
    x, y = centre.unbind(-1)
    return coat.clamp(0, 1), torch.stack([
        torch.stack([along, across, -along * x - across * y], -1) * mirror[..., None],
        torch.stack([-across, along, across * x - along * y], -1)], 2)


def pieces(number, kind, centre, drift):
    """The clutter (B, 6 behind and 2 before the creatures, 10): balls and sticks, anywhere."""
    v = number("scenery", CLUTTER + FRONT, 8)
    stick = torch.arange(CLUTTER, device=v.device) % 3 > 0
    front = torch.arange(CLUTTER + FRONT, device=v.device) >= CLUTTER
    stick = torch.cat([stick, stick.new_ones(FRONT)])
    before = between(-0.6, 0.6, v[..., :2]) if kind != "single" else (
        centre + between(-0.5, 0.5, v[..., :2]))                                # on the creature
    where = torch.where(front[:, None], before, between(-1.1, 1.1, v[..., :2]) + drift)
    way = torch.where(front, between(-0.5, 0.5, v[..., 2]) - math.pi / 2, v[..., 2] * 2 * math.pi)
    length = torch.where(front, between(0.1, 0.7, v[..., 3]), 0.05 + 0.9 * v[..., 3] * stick)
    radius = torch.where(stick, between(0.015, 0.06, v[..., 4]), between(0.06, 0.25, v[..., 4]))
    radius = torch.where(front, between(0.03, 0.12, v[..., 4]), radius)
    radius = radius.masked_fill(front & (v[..., 6] > (0.2 if kind == "film" else 0.35)), -9)
    root = where - torch.stack([way.cos(), way.sin()], -1) * length[..., None] / 2
    return torch.stack([
        *root.unbind(-1), way.cos(), way.sin(), torch.ones_like(way), length, radius, 0 * way,
        -0.6 * radius * (length > 0.3), (v[..., 5] - 0.5) * length], -1)


def world(index, split, seed, kind, time=None):
    """(B,) image numbers -> dict of float32 tensors (B, ...) to paint, classes (B, K), key-points.

    kind: "single", "scene" or "film"; time: (B,) in [0, 1], 0 for stills; key-points (B, K, P, 3):
    x, y and whether there is such a part. Worked out in float64: the last bit of a sine may depend
    on its place in the batch, and is gone in the float32 that pixels are made from."""
    def number(what, *shape):
        return rng.uniform(index, shape, seed, split, "toy", kind, what).double()

    time = torch.zeros_like(index, dtype=torch.float64) if time is None else time
    cls, bones, absent, centre, size, angle, mirror, drift = creatures(number, kind, time)
    coat, place = coats(number, centre, size, angle, mirror)
    light, ground = number("light", 4), number("ground", 3)
    sun, aim = light[:, 0] * 2 * math.pi, ground[:, 0] * 2 * math.pi
    paint = dict(
        bones=equations(bones), coat=coat, place=place, size=size,
        pieces=equations(pieces(number, kind, centre[:, :1], drift)),
        piece_colour=colour(number("pieces", CLUTTER + FRONT, 3), (0, 0.2), (0.25, 0.75)),
        sky=colour(number("sky", 3, 3), (0, 0.04), (0.45, 0.5)),                # two of sky, ground
        ramp=torch.stack([aim.cos(), aim.sin()], -1) * 0.5,
        ground=torch.stack([between(0, 0.9, ground[:, 1]) + drift[:, 0, 1],
                            between(-0.3, 0.3, ground[:, 2])], -1),
        light=torch.stack([sun.cos(), sun.sin(), between(0.3, 0.7, light[:, 1]),
                           between(0.95, 1.05, light[:, 2])], -1),
        noise=number("noise", 1, 16, 16) - 0.5, rough=between(0.2, 0.5, light[:, 3]))
    bone, t = (torch.tensor(x, device=index.device) for x in zip(*CENTRE))
    points = torch.stack([*axis(bones[:, :, bone], t), (~absent[:, :, bone]).double()], -1)
    return {name: x.float() for name, x in paint.items()}, cls, points.float()


# ---- paint: spindles -> pixels -------------------------------------------------------------------


def equations(s):
    """Spindles (..., 10) -> (..., 11): t and the way across as a x + b y + c, and the rest."""
    x, y, cos, sin, side, length, r0, r1, r2, bend = s.unbind(-1)
    return torch.stack([cos / length, sin / length, -(cos * x + sin * y) / length,
                        -sin * side, cos * side, (sin * x - cos * y) * side,
                        -bend, length**2, r0, -r1, -r2], -1)


def plane(a, b, c, grid):
    """a x + b y + c on the pixels: (..., 1, 1) each, grid (S,) -> (..., S, S)."""
    return (a * grid + c) + b * grid[:, None]


def distance(e, grid):
    """Signed distance (inside < 0) of the pixels to spindles: (B, n, 11), (S,) -> (B, n, S, S)."""
    e = e[..., None, None].unbind(2)                                # eleven of (B, n, 1, 1)
    t, across = plane(*e[:3], grid), plane(*e[3:6], grid)         # t is 0 at the root, 1 at the tip
    inside = t.clamp(0, 1)
    square = inside * inside
    across.addcmul_(square, e[6])                                   # measured from the bent axis
    t.sub_(inside).mul_(t)                                          # beyond the ends, squared
    d = across.mul_(across).addcmul_(t, e[7]).sqrt_()
    return d.sub_(e[8]).addcmul_(inside, e[9]).addcmul_(square, e[10])          # less the radius


def paint(w, size, annotate):
    """A world of B images -> (B, 3, S, S) uint8, instances and parts (B, S, S) uint8."""
    B, K = w["coat"].shape[:2]
    grid = (torch.arange(size, device=w["sky"].device) + 0.5) * (2 / size) - 1  # pixel centres
    flat = ("bones", "pieces", "noise", "coat")
    w = {name: x if name in flat else x[..., None, None] for name, x in w.items()}
    instances, parts = (grid.new_zeros(B, size, size, dtype=torch.uint8) for _ in range(2))

    def layer(d, tint, instance=0, part=0):
        cover = (d * (-size / 2)).add_(0.5).clamp_(0, 1)            # an edge is one pixel wide
        canvas.lerp_(tint, cover)
        if annotate:
            instances.masked_fill_(d[:, 0] < 0, instance)
            parts.masked_fill_(d[:, 0] < 0, part)
        return cover

    ramp = plane(w["ramp"][:, 0], w["ramp"][:, 1], 0.5, grid)[:, None].clamp_(0, 1)
    canvas = torch.lerp(w["sky"][:, 0], w["sky"][:, 1], ramp)                   # (B, 3, S, S)
    ground = plane(w["ground"][:, 1], -1, w["ground"][:, 0], grid)
    noise = F.interpolate(w["noise"], size=(size, size), mode="bilinear")
    layer(ground[:, None], w["sky"][:, 2])
    clutter = [d[:, None] for i in range(0, CLUTTER + FRONT, 3)
               for d in distance(w["pieces"][:, i:i + 3], grid).unbind(1)]
    for i in range(CLUTTER):
        layer(clutter[i], w["piece_colour"][:, i])
    canvas.mul_((noise * w["rough"][:, None]).add_(1))

    for k in range(K):
        bones = w["bones"][:, k]
        there = (bones[..., 8] > -9).any(0).tolist()                # which bones anyone here has
        cover, height = torch.zeros_like(ramp), torch.zeros_like(ramp)
        where = torch.stack([plane(*p.unbind(1), grid) for p in w["place"][:, k].unbind(1)], -1)
        coat = F.grid_sample(w["coat"][:, k], where, padding_mode="reflection", align_corners=False)
        tints = {bright: coat * bright for bright in (0.75, 1)}
        tints |= {grey: grid.new_tensor(grey) for *_, grey in LAYERS[EYES:]}
        bulge = -1 / (0.22 * w["size"][:, k, None])
        for i, (shape, low, high, bright) in enumerate(LAYERS):
            if i == EYES:
                light(canvas, cover, height, w, k)
            high = max([low, *(j + 1 for j in range(low, high) if there[j])])
            if high > low:
                d = distance(bones[:, low:high], grid).amin(1, keepdim=True)    # their union
                part = PARTS.index("head" if shape == "eye" else shape) + 1
                c = layer(d, tints[bright], k + 1, part)
                height.lerp_(d.mul_(bulge).clamp_(0, 1), c)         # each part is a pillow
                torch.maximum(cover, c, out=cover)
    for i in range(CLUTTER, CLUTTER + FRONT):
        layer(clutter[i], w["piece_colour"][:, i])
    canvas.mul_(w["light"][:, 3:4] * 255).add_(0.5).clamp_(0, 255)
    return canvas.to(torch.uint8), instances, parts


def light(canvas, cover, height, w, k):
    """Outline and relief of creature k: the canvas is multiplied by them, in place."""
    size = canvas.shape[-1]
    step = max(1, size // 64)                                   # pixels: the same slope at any size
    sun = w["light"] * (size / step) * 0.06
    dome = height * (2 - height)
    relief = (dome - dome.roll(step, 3)) * sun[:, 0, None]
    relief.addcmul_(dome - dome.roll(step, 2), sun[:, 1, None])
    relief.mul_(w["light"][:, 2, None] * w["size"][:, k, None]).add_(1)
    outline = (height * 5).clamp_(0, 1).mul_(0.35).add_(0.65)
    canvas.mul_(relief.mul_(outline).sub_(1).mul_(cover).add_(1))


def pixels(index, split, size, seed, kind, annotate, time=None):
    """Image, instances, parts (see `paint`), classes and key-points (see `world`)."""
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"toy: index must be a one-dimensional int64 tensor of image numbers, "
                         f"got {index.dtype} of shape {tuple(index.shape)}; try torch.arange(16)")
    if split not in NUM_IMAGES:
        raise ValueError(f"toy: no split {split!r}; there are {' and '.join(NUM_IMAGES)}")
    w, cls, points = world(index, split, seed, kind, time)
    out = [torch.empty(len(index), *shape, size, size, dtype=torch.uint8, device=index.device)
           for shape in ((3,), (), ())]
    # In blocks that fit the cache, of one class where possible: parts that it lacks cost nothing.
    block = max(1, (1 << (16 if index.device.type == "cpu" else 23)) // size**2)
    for some in cls[:, 0].argsort(stable=True).split(block):
        painted = paint({name: x[some] for name, x in w.items()}, size, annotate)
        for whole, part in zip(out, painted):
            whole[some] = part
    return *out, cls, points


# ---- annotate ------------------------------------------------------------------------------------


def draw(index, split="train", size=64, scenes=False, annotate=False, seed=0):
    """(B,) int64 image numbers -> dict of tensors; K is 1, or 4 in scenes.

    "image" (B, 3, S, S) uint8, "label" (B,) int64 (of a scene: the class of which most is seen, by
    creature). annotate adds, for what can be seen,
    "instances", "parts", "semantic" (B, S, S) uint8: creature 1 ... K, far to near; part, 1 ... P;
                 class + 1; 0 is background
    "keypoints"  (B, K, P, 3) float32: x, y in pixels, v: 0 no such part, 1 hidden, 2 visible
    "boxes"      (B, K, 4) float32: x0, y0, x1, y1 in pixels, zeros if nothing of it is seen
    "classes"    (B, K) int64, -1 if nothing of it is seen.
    ValueError: the index is not (B,) int64, or there is no such split."""
    image, instances, parts, cls, points = pixels(
        index, split, size, seed, "scene" if scenes else "single", annotate or scenes)
    if not (annotate or scenes):
        return {"image": image, "label": cls[:, 0]}
    number = torch.arange(1, cls.shape[1] + 1, device=index.device)[:, None, None]
    masks = instances[:, None] == number                                        # (B, K, S, S)
    area = masks.sum((2, 3))
    out = {"image": image, "label": cls.gather(1, area.argmax(1, keepdim=True))[:, 0]}
    if not annotate:
        return out
    classes = torch.where(area > 0, cls, -1)
    semantic = F.pad(classes + 1, (1, 0)).gather(1, instances.flatten(1).long())
    columns, rows = masks.any(2).byte(), masks.any(3).byte()
    boxes = torch.stack([columns.argmax(2), rows.argmax(2), size - columns.flip(2).argmax(2),
                         size - rows.flip(2).argmax(2)], -1) * (area > 0)[..., None]
    xy = (points[..., :2] + 1) * (size / 2)
    column, row = xy.floor().long().unbind(-1)                                  # (B, K, P)
    inside = (column.clamp(0, size - 1) == column) & (row.clamp(0, size - 1) == row)
    place = (row * size + column).masked_fill(~inside, 0).flatten(1)
    part = torch.arange(1, len(PARTS) + 1, device=index.device)
    seen = inside & (instances.flatten(1).gather(1, place).view_as(inside) == number[..., 0])
    seen &= parts.flatten(1).gather(1, place).view_as(inside) == part
    v = points[..., 2] * (1 + seen) * (area > 0)[..., None]
    return out | {"instances": instances, "parts": parts, "classes": classes,
                  "semantic": semantic.view_as(instances).to(torch.uint8),
                  "boxes": boxes.float(), "keypoints": torch.cat([xy, v[..., None]], -1)}


# ---- video ---------------------------------------------------------------------------------------


def video(index, frames=16, split="test", size=64, scenes=True, seed=0):
    """(B,) int64 film numbers -> dict: "image" (B, T, 3, S, S), "instances", "parts" (B, T, S, S),
    all uint8, and "classes" (B, K) int64, -1 for none; K is 3, or 1 without scenes.

    Creatures walk, two of them across each other, before a camera that drifts, and keep their
    numbers. The film is the same whatever the number of frames it is shot in."""
    time = torch.linspace(0, 1, frames, device=index.device, dtype=torch.float64).repeat(len(index))
    image, instances, parts, cls, _ = pixels(index.repeat_interleave(frames), split, size, seed,
                                             "film" if scenes else "single", True, time)
    films = {"image": image, "instances": instances, "parts": parts}
    films = {name: x.unflatten(0, (len(index), frames)) for name, x in films.items()}
    return films | {"classes": cls[::frames]}


# ---- contact sheet -------------------------------------------------------------------------------


def overlay(image, ids, points=()):
    """(3, S, S) uint8, ids (S, S), points (n, 3) -> uint8: a colour per id, a cross per point."""
    tints = 255 * colour(torch.stack([torch.arange(16) * 0.382 % 1, *torch.ones(2, 16)], -1))
    tint = tints[ids.long() % 16].permute(2, 0, 1)
    out = torch.where(ids == 0, image * 0.4, image * 0.35 + tint * 0.65).to(torch.uint8)
    for x, y, v in points:
        if v == 2:
            x, y = int(x), int(y)
            out[:, y, max(0, x - 1):x + 2] = out[:, max(0, y - 1):y + 2, x] = 255
    return out


def contact_sheet(size=80, seed=0):
    """PIL image: six creatures of each class; scenes with instances, parts, key-points; a film."""
    from PIL import Image, ImageDraw
    cls = world(torch.arange(1000), "train", seed, "single")[1][:, 0]
    rows = []                                                   # label, label in the middle, images
    for pair in zip(CLASSES[::2], CLASSES[1::2]):
        index = [(cls == CLASSES.index(name)).nonzero()[:6, 0] for name in pair]
        rows.append((*pair, draw(torch.cat(index), "train", size, seed=seed)["image"]))
    scene = draw(torch.arange(8), "train", size, scenes=True, annotate=True, seed=seed)
    for part in range(0, 8, 2), range(1, 8, 2):
        cells = [(image, overlay(image, scene["instances"][i]),
                  overlay(image, scene["parts"][i], scene["keypoints"][i].flatten(0, 1)))
                 for i in part for image in [scene["image"][i]]]
        rows.append(("scenes", "scenes", torch.stack(sum(cells, ()))))
    film = {name: x[0] for name, x in video(torch.arange(1), 12, "train", size, seed=seed).items()}
    masks = [overlay(*pair) for pair in zip(film["image"], film["instances"])]
    rows += [("film", "film", film["image"]), ("masks", "masks", torch.stack(masks))]
    cell, margin = size + 2, 64
    sheet = Image.new("RGB", (2 * margin + 12 * cell, len(rows) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (*labels, images) in enumerate(rows):
        for half, label in enumerate(labels):
            left = half * (margin + 6 * cell)
            pen.text((left + 4, r * cell + size // 2 - 5), label, fill="black")
            for c, image in enumerate(images[6 * half:6 * half + 6]):
                tile = Image.fromarray(image.permute(1, 2, 0).numpy())
                sheet.paste(tile, (left + margin + c * cell, r * cell + 1))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/toy.png", help="where to write (default %(default)s)")
    path = parser.parse_args().out
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    contact_sheet().save(path)
    print(f"wrote {path}: {len(CLASSES)} classes, scenes with instances and parts, a film")
