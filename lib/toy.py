"""The built-in synthetic data set: images and videos of creatures, drawn by code and annotated.

    out = toy.draw(torch.arange(64), "train", annotate=True)   # out["image"]: (64, 3, 64, 64) uint8
    python -m lib.toy        # writes out/toy.png: all classes, annotated scenes, a video

A creature is a tree of bones: legs are attached to the torso, ears to the head. Every bone is drawn
as a *spindle*: an axis that may be bent, with a radius at its root, middle and tip. Sausages, eggs,
horns, leaves and balls are spindles. The distance of a pixel to a spindle takes about a dozen
operations, is computed for a whole batch at once, and gives antialiased edges. Bones swing: an
image is one moment of a walk, and a video is the walk.

A class is a combination of shapes of parts (CLASS_PARTS, built from SHAPES), and it has a typical
pattern of the coat (CLASS_PATTERN): nine of ten elephants wear a net, the others any pattern. The
pattern covers the whole creature and continues where the creature is hidden, so a masked patch is
predictable. In cue-conflict images shape and pattern are of different classes, for the probe
shape_bias.

Everything else, that is hue, pose, direction, rotation, size, position, light, clutter and
occluders, has the same distribution for all classes. Backgrounds are gray and nearly the same in
all images, as contrastive methods would otherwise recognize an image by its background and learn
nothing about the creature. python -m benchmarks.world measures what raw pixels, labels and
pretraining make of it.

An image is a function of (seed, split, index) only (rng.py), in coordinates [-1, 1] x [-1, 1]:
at another size it is the same image at another resolution.
"""
import argparse
import functools
import math
import os

import torch
import torch.nn.functional as F

from lib import rng
from lib.colors import class_colors

# Shapes: B images, S image side; creatures (of an image), bones (of a creature), parts and frames
# are written as words.

# ---- anatomy -------------------------------------------------------------------------------------

NEXT = -1.0        # in the column `at`: this bone starts where the previous one ends
# Part: {shape: its bones}. Lengths: 1 is about a body. Angles in degrees: 0 forward, 90 down, -90
# up, 180 backward. at: position on the axis of the parent; bend: distance of the tip from the axis,
# in lengths of the bone.
SHAPES = {
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
    "fin": {     # two on the back, behind the torso; one on the side, in front of it
        "round":   [(.65, -110, .50,  .14, .14, .08,   0), (.35, -130, .34, .12, .10, .06, 0),
                    (.65,  135, .28,  .05, .09, .05,   0)],
        "blade":   [(.55, -118, .64,  .18, .09, .00, -.1), (.20, -135, .22, .07, .04, .00, 0),
                    (.65,  120, .50,  .10, .08, .00,  .1)],
        "spikes":  [(.70, -105, .34,  .12, .06, .00,   0), (.30, -105, .34, .12, .06, .00, 0)]},
    "shell": {
        "dome":    [(-.02, -6,  .95,  .12, .38, .12,   0)],
        "coil":    [(.35, -95,  .28,  .36, .36, .36,   0)]},
    "eye": {     # white and pupil: the same for all classes
        "round":   [(.50, -75,  .07,  .07, .07, .07,   0), (NEXT, 0, .03, .04, .04, .04, 0)]}}

CLASS_PARTS = {     # class: shapes of its parts, the only difference between classes
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
CLASSES = list(CLASS_PARTS)
CLASS_PATTERN = {   # class: name in PATTERNS of the pattern that most of its members wear
    "cat": "bars", "rabbit": "plain", "elephant": "net", "giraffe": "blotches",
    "crocodile": "checks", "turtle": "diamonds", "snail": "rings", "duck": "dashes",
    "stork": "lines", "fish": "zigzag", "shark": "speckles", "bat": "crosses",
    "butterfly": "eyes", "ant": "bands", "spider": "dots", "dragon": "scales"}
TYPICAL = 0.9                           # probability of the typical pattern; else any of the 16
PARTS = ["torso", "head", "ear", "snout", "leg", "wing", "tail", "fin", "shell"]   # id: 1, 2, ...
KEYPOINTS = PARTS                                                             # one per part
NUM_IMAGES = {"train": 20000, "test": 2000}

# The bones of every creature, parents before children: part, row of its shape, index of the parent.
SKELETON = [("torso", 0, 0), ("neck", 0, 0), ("head", 0, 1), ("eye", 0, 2), ("eye", 1, 2),
            ("ear", 0, 2), ("ear", 1, 2), ("snout", 0, 2), ("snout", 1, 2),
            *[("leg", i, 0) for i in (0, 1, 2, 3)] * 2, *[("wing", i, 0) for i in (0, 1)] * 2,
            *[("tail", i, 0) for i in (0, 1)], *[("fin", i, 0) for i in (0, 1, 2)], ("shell", 0, 0)]
LAYERS = [     # drawing order, back to front: part, first bone, last bone + 1, brightness
    ("wing", 17, 19, 0.75), ("leg", 9, 13, 0.75), ("tail", 21, 23, 1), ("fin", 23, 25, 1),
    ("ear", 5, 6, 0.75), ("torso", 0, 2, 1), ("shell", 26, 27, 1), ("leg", 13, 17, 1),
    ("head", 2, 3, 1), ("snout", 7, 9, 1), ("fin", 25, 26, 1), ("ear", 6, 7, 1),
    ("wing", 19, 21, 1), ("eye", 3, 4, 0.97), ("eye", 4, 5, 0.06)]          # white, pupil
FIRST_EYE_LAYER = 13
KEYPOINT_BONES = [(0, 0.45), (2, 0.3), (6, 0.7), (7, 0.7), (13, 0.7),    # bone, position on axis
                  (19, 0.6), (21, 0.7), (23, 0.85), (26, 0.5)]
SWING = dict(torso=2, neck=4, head=4, eye=0, ear=6, snout=2, leg=9, wing=10, tail=7, fin=5,
             shell=1)                                                # amplitude in degrees
FAR = {9: 8, 10: 8, 11: 8, 12: 8, 17: 38, 18: 22}       # bone -> extra angle of far limbs, degrees
CLUTTER, FRONT = 6, 2                   # number of objects behind and in front of the creatures
GRAY = 0.46                             # mean value of backgrounds, the mean color of ImageNet


def build_anatomy():
    """(C, bones, 7) rows of SHAPES, zeros where a class has no such bone."""
    table = torch.zeros(len(CLASSES), len(SKELETON), 7, dtype=torch.float64)
    for c, parts in enumerate(CLASS_PARTS.values()):
        for j, (part, row, _) in enumerate(SKELETON):
            shape = {"neck": "short", "eye": "round", **parts}.get(part)
            rows = SHAPES[part].get(shape, [])
            if row < len(rows):
                table[c, j] = torch.tensor(rows[row])
                table[c, j, 1] += FAR.get(j, 0) * (rows[row][0] != NEXT)
    return table


ANATOMY = build_anatomy()

# ---- coats ---------------------------------------------------------------------------------------

# Name: is the point (x, y) marked? A period is 1; fx and fy are the distances from the middle of a
# period, 0 to 1; s is fx, but shifted by half a period in every second row; a and b are noise.
PATTERNS = {
    "plain":    lambda x, y, fx, fy, s, a, b: x < 0,
    "bars":     lambda x, y, fx, fy, s, a, b: fx < 0.4,
    "lines":    lambda x, y, fx, fy, s, a, b: fy < 0.4,
    "bands":    lambda x, y, fx, fy, s, a, b: wide(x) < 0.45,
    "checks":   lambda x, y, fx, fy, s, a, b: (fx < 0.5) ^ (fy < 0.5),
    "net":      lambda x, y, fx, fy, s, a, b: torch.minimum(fx, fy) < 0.22,
    "diamonds": lambda x, y, fx, fy, s, a, b: ((fx + fy) % 1 - 0.5).abs() < 0.17,
    "dots":     lambda x, y, fx, fy, s, a, b: torch.minimum(fx.hypot(fy),
                                                            (1 - fx).hypot(1 - fy)) < 0.5,
    "eyes":     lambda x, y, fx, fy, s, a, b: (fx.hypot(fy) - 0.675).abs() < 0.225,
    "rings":    lambda x, y, fx, fy, s, a, b: wide(x).hypot(wide(y)) * 2.5 % 1 < 0.45,
    "dashes":   lambda x, y, fx, fy, s, a, b: (fy < 0.45) & (s > 0.45),
    "zigzag":   lambda x, y, fx, fy, s, a, b: ((y + fx / 2) % 1 - 0.5).abs() < 0.22,
    "crosses":  lambda x, y, fx, fy, s, a, b: ((fx < 0.25) & (fy < 0.7)
                                               | (fy < 0.25) & (fx < 0.7)),
    "scales":   lambda x, y, fx, fy, s, a, b: (s.hypot(y % 1) - 0.9).abs() < 0.16,
    "blotches": lambda x, y, fx, fy, s, a, b: a > a.median(),
    "speckles": lambda x, y, fx, fy, s, a, b: b > b.median()}


def wide(x):
    """Distance from the middle of a period of 2, from 0 to 1."""
    return (x / 2 % 1 - 0.5).abs() * 2


@functools.cache
def tiles():
    """(C, 1, 32, 32): the typical pattern of each class, four periods of it, 1 where it is marked.
    The mean over 8 x 8 points of each pixel, so that edges are smooth."""
    x = ((torch.arange(256) + 0.5) / 64).expand(256, 256)
    y = x.T
    fx, fy = ((z % 1 - 0.5).abs() * 2 for z in (x, y))
    s = ((x + y.floor() % 2 / 2) % 1 - 0.5).abs() * 2
    noise = [F.interpolate(rng.uniform(torch.tensor([0]), (1, n, n), "toy", "pattern", n),
                           size=(256, 256), mode="bicubic")[0, 0] for n in (6, 16)]
    marked = torch.stack([PATTERNS[name](x, y, fx, fy, s, *noise)
                          for name in CLASS_PATTERN.values()])
    return F.avg_pool2d(marked[:, None].float(), 8)


# ---- pose: bones -> spindles ---------------------------------------------------------------------

# Columns of a spindle. The radius at t (0 root, 1 tip) is R0 + R1 t + R2 t^2.
X, Y, COS, SIN, SIDE, LENGTH, R0, R1, R2, BEND = range(10)


def point_on_axis(s, t):
    """Spindles (..., 10), t (0 root, 1 tip) -> x, y of the point on the axis."""
    along, across = s[..., LENGTH] * t, s[..., SIDE] * s[..., BEND] * t * t
    return (s[..., X] + s[..., COS] * along - s[..., SIN] * across,
            s[..., Y] + s[..., SIN] * along + s[..., COS] * across)


def pose_skeleton(cls, u, time):
    """(B,) classes, (B, bones, 4) uniform numbers, (B,) time -> (B, bones, 10) spindles, facing
    right. The rotation of a bone includes that of its parent: the ear turns with the head."""
    rest = ANATOMY.to(cls.device)[cls]
    out, turn = rest.new_zeros(*rest.shape[:2], 10), torch.zeros_like(rest[..., 0])
    swing = torch.tensor([SWING[part] for part, *_ in SKELETON], device=cls.device)
    swing = swing * (2 * math.pi * (u[..., 0] + 2 * time[:, None])).sin()       # two strides
    for j, (part, _, parent) in enumerate(SKELETON):
        at, angle, length, root, middle, tip, bend = rest[:, j].unbind(-1)
        chained = at == NEXT
        base = torch.where(chained[:, None], out[:, j - 1], out[:, parent])    # zeros for the torso
        turn[:, j] = swing[:, j] + torch.where(chained, turn[:, j - 1], turn[:, parent])
        x, y = point_on_axis(base, torch.where(chained, 1, at))
        angle = (angle + turn[:, j]) * (math.pi / 180)
        length, width = length * (0.88 + 0.24 * u[:, j, 1]), 0.9 + 0.2 * u[:, j, 2]
        bend = (bend + 0.3 * (u[:, j, 3] - 0.5) * (SWING[part] > 5)) * length
        out[:, j] = torch.stack([
            x, y, angle.cos(), angle.sin(), torch.ones_like(x), length, root * width,
            (4 * middle - 3 * root - tip) * width, 2 * (root + tip - 2 * middle) * width, bend], -1)
    return out


def bounding_box(s):
    """(B, bones, 10) spindles -> (B, 2) lower and (B, 2) upper corner of their bounding box."""
    t = torch.tensor([0, 0.5, 1], device=s.device, dtype=s.dtype)
    xy = torch.stack(point_on_axis(s[:, :, None], t), -1)                       # (B, bones, 3, 2)
    radius = (s[..., R0, None] + s[..., R1, None] * t + s[..., R2, None] * t * t)[..., None]
    none = (s[..., LENGTH] == 0)[..., None, None]
    return ((xy - radius).masked_fill(none, math.inf).amin((1, 2)),
            (xy + radius).masked_fill(none, -math.inf).amax((1, 2)))


def transform(s, scale, mirror, angle, shift):
    """Scales, mirrors (1 or -1), rotates (radians) and shifts (B, 2) spindles (B, bones, 10), in
    this order."""
    scale, mirror, angle = scale[:, None], mirror[:, None], angle[:, None]

    def rotate(x, y):
        return (angle.cos() * mirror * x - angle.sin() * y,
                angle.sin() * mirror * x + angle.cos() * y)

    x, y = rotate(s[..., X] * scale, s[..., Y] * scale)
    sizes = s[..., LENGTH:] * scale[..., None]
    return torch.stack([x + shift[:, :1], y + shift[:, 1:], *rotate(s[..., COS], s[..., SIN]),
                        s[..., SIDE] * mirror, *sizes.unbind(-1)], -1)


# ---- scene parameters: random numbers -> all that is visible, without pixels ---------------------


def between(low, high, u):
    return low + (high - low) * u


def hsv_color(u, saturation=(0, 1), value=(0, 1)):
    """(..., 3) uniform numbers -> (..., 3) RGB with saturation and value in these ranges."""
    k = (u[..., :1] * 6 + torch.tensor([5.0, 3.0, 1.0], device=u.device)) % 6
    s, v = between(*saturation, u[..., 1:2]), between(*value, u[..., 2:])
    return v * (1 - s * torch.minimum(k, 4 - k).clamp(0, 1))


def sample_creatures(uniform, kind, time):
    """-> classes (B, creatures); spindles (B, creatures, bones, 10); absent (B, creatures, bones)
    bool; center (B, creatures, 2); half of the longer side, angle and mirror, (B, creatures) each;
    drift of the camera (B, 1, 2)."""
    n_creatures = {"single": 1, "scene": 4, "video": 3}[kind]
    u, pose = uniform("creature", n_creatures, 16), uniform("pose", n_creatures, len(SKELETON), 4)
    cls = (u[..., 0] * len(CLASSES)).long()
    mirror = torch.where(u[..., 1] < 0.5, -1.0, 1.0).double()
    angle = between(-0.2, 0.2, u[..., 2])                                       # +-11 degrees
    order = torch.arange(n_creatures, device=cls.device)                        # far to near
    if kind == "single":
        count, size = 1, between(0.7, 0.95, u[..., 3])
        start = between(-1.4, 1.4, u[..., 4:6]) * (1 - size[..., None]).clamp(min=0.18)
        end = start
    else:
        count = 2 + (uniform("count", 1) * (n_creatures - 1)).floor()           # (B, 1): 2 or more
        depth = order / (count - 1)
        size = between(0.34, 0.46, u[..., 3]) + 0.16 * depth                    # nearer is larger
        x = (u[:, :1, 4] + 0.618 * order) % 1 * 1.3 - 0.65                     # spread; may overlap
        y = between(-0.38, -0.18, u[..., 5]) + 0.6 * depth                      # nearer is lower
        start = end = torch.stack([x, y], -1)
    if kind == "video":                                                     # two exchange sides
        side = torch.where(u[:, :1, 6] < 0.5, -1.0, 1.0)
        places = torch.tensor([[-0.6, 0.6, 0.0], [0.6, -0.6, 0.45]], device=cls.device)
        start, end = [torch.stack([side * x + 0.12 * u[..., 7] - 0.06, y], -1) for x in places]
        mirror, angle = (end - start)[..., 0].sign(), angle * 0.5               # walk forward
    times, flat = time.repeat_interleave(n_creatures), (mirror.flatten(), angle.flatten())
    cls_, pose = cls.flatten(), pose.flatten(0, 1)       # (B creatures,), (B creatures, bones, 4)
    still = pose_skeleton(cls_, pose, torch.zeros_like(times))
    low, high = bounding_box(transform(still, torch.ones_like(times), *flat,
                                       torch.zeros_like(still[:, 0, :2])))
    scale = size.flatten() / ((high - low) / 2).amax(1)       # the same size for all classes
    drift = between(-0.25, 0.25, uniform("drift", 2))[:, None] * time[:, None, None]
    center = start + (end - start) * time[:, None, None] + drift
    shift = center.flatten(0, 1) - (low + high) / 2 * scale[:, None]
    bones = transform(pose_skeleton(cls_, pose, times), scale, *flat, shift)
    bones = bones.unflatten(0, cls.shape)
    absent = (bones[..., LENGTH] == 0) | (order >= count)[..., None]
    bones[..., LENGTH].masked_fill_(absent, 1)
    bones[..., R0].masked_fill_(absent, -9)                                     # covers no pixel
    cls = torch.where(order < count, cls, -1)
    return cls, bones, absent, center, size, angle, mirror, drift


def sample_coats(uniform, cls, center, size, angle, mirror, cue_conflict):
    """-> patterns (B, creatures): the classes that they are typical of; their two colors (B,
    creatures, 2, 3); coordinates (B, creatures, 2, 3), planes that follow the creature; phases of
    their waves (B, creatures, 2). With cue_conflict the pattern is that of another class.

    The colors have any hue and a strong contrast, from which networks learn quickly. They are moved
    so that the mean color of a coat does not tell its pattern, and is halfway between vivid and the
    background's gray: raw pixels then know less of the outline."""
    u, hue = uniform("coat", size.shape[1], 7), uniform("hue", size.shape[1], 2)
    any_pattern = (u[..., 0] * len(CLASSES)).long()
    pattern = torch.where(u[..., 1] < TYPICAL, cls, any_pattern)
    if cue_conflict:                                                # each of the other 15
        pattern = (cls + 1 + (u[..., 0] * (len(CLASSES) - 1)).long()) % len(CLASSES)
    pattern = pattern.masked_fill(cls < 0, 0)                                   # no creature
    hue[..., 1] = (hue[..., 0] + between(0.4, 0.6, hue[..., 1])) % 1            # about opposite
    full = torch.ones_like(hue)
    base, mark = hsv_color(torch.stack([hue, full, full], -1), (0, 0.7)).unbind(2)
    mark = 0.08 * mark                                                          # nearly black
    marked = tiles().mean((1, 2, 3)).to(base)                                   # fraction of pixels
    mean = torch.lerp(base, mark, marked.mean())                    # of a coat, whatever pattern
    excess = torch.lerp(base, mark, marked[pattern][..., None]) - (mean + GRAY) / 2
    colors = (torch.stack([base, mark], 2) - excess[:, :, None]).clamp(0, 1)
    zoom = 1.1 * between(0.9, 1.1, u[..., 2]) / size
    along, across = zoom * angle.cos(), zoom * angle.sin()
    x, y = center.unbind(-1)
    axes = torch.stack([
        torch.stack([along, across, -along * x - across * y], -1) * mirror[..., None],
        torch.stack([-across, along, across * x - along * y], -1)], 2)
    axes[..., 2] += between(-1, 1, u[..., 3:5])                     # another piece of the pattern
    return pattern, colors, axes, u[..., 5:] * 2 * math.pi


def sample_objects(uniform, kind, center, drift):
    """Spindles (B, CLUTTER + FRONT, 10): balls and sticks behind and in front of the creatures."""
    v = uniform("scenery", CLUTTER + FRONT, 8)
    stick = torch.arange(CLUTTER, device=v.device) % 3 > 0
    front = torch.arange(CLUTTER + FRONT, device=v.device) >= CLUTTER
    stick = torch.cat([stick, stick.new_ones(FRONT)])
    occluders = between(-0.6, 0.6, v[..., :2]) if kind != "single" else (
        center + between(-0.5, 0.5, v[..., :2]))                                # on the creature
    middle = torch.where(front[:, None], occluders, between(-1.1, 1.1, v[..., :2]) + drift)
    angle = torch.where(front, between(-0.5, 0.5, v[..., 2]) - math.pi / 2, v[..., 2] * 2 * math.pi)
    length = torch.where(front, between(0.1, 0.7, v[..., 3]), 0.05 + 0.9 * v[..., 3] * stick)
    radius = torch.where(stick, between(0.015, 0.06, v[..., 4]), between(0.06, 0.25, v[..., 4]))
    radius = torch.where(front, between(0.03, 0.12, v[..., 4]), radius)
    radius = radius.masked_fill(front & (v[..., 6] > (0.2 if kind == "video" else 0.35)), -9)
    root = middle - torch.stack([angle.cos(), angle.sin()], -1) * length[..., None] / 2
    return torch.stack([
        *root.unbind(-1), angle.cos(), angle.sin(), torch.ones_like(angle), length,
        radius, 0 * angle, -0.6 * radius * (length > 0.3), (v[..., 5] - 0.5) * length], -1)


def sample_scene(index, split, seed, kind, time=None, cue_conflict=False):
    """(B,) indices of images -> dict of float32 scene parameters (B, ...) for `render`, classes
    (B, creatures), patterns (B, creatures), keypoints (B, creatures, parts, 3): x, y and whether
    the part exists.

    kind: "single", "scene" or "video"; time: (B,) in [0, 1], default 0. Computed in float64, then
    rounded to float32, because the last bit of a sine may depend on the position in the batch."""
    def uniform(purpose, *shape):
        return rng.uniform(index, shape, seed, split, "toy", kind, purpose).double()

    time = torch.zeros_like(index, dtype=torch.float64) if time is None else time
    cls, bones, absent, center, size, angle, mirror, drift = sample_creatures(uniform, kind, time)
    pattern, colors, coat_axes, wave = sample_coats(uniform, cls, center, size, angle, mirror,
                                                    cue_conflict)
    light, ground = uniform("light", 4), uniform("ground", 3)
    sun, aim = light[:, 0] * 2 * math.pi, ground[:, 0] * 2 * math.pi
    scene = dict(
        bones=equations(bones), coat=tiles().to(cls.device)[pattern], coat_colors=colors,
        coat_axes=coat_axes, wave=wave, size=size,
        objects=equations(sample_objects(uniform, kind, center[:, :1], drift)),
        object_color=hsv_color(uniform("pieces", CLUTTER + FRONT, 3), (0, 0.15), (0.45, 0.75)),
        sky=hsv_color(uniform("sky", 3, 3), (0, 0.06), (GRAY - 0.02, GRAY + 0.02)),  # two, ground
        ramp=torch.stack([aim.cos(), aim.sin()], -1) * 0.5,
        ground=torch.stack([between(0, 0.9, ground[:, 1]) + drift[:, 0, 1],
                            between(-0.3, 0.3, ground[:, 2])], -1),
        light=torch.stack([sun.cos(), sun.sin(), between(0.3, 0.7, light[:, 1]),
                           between(0.95, 1.05, light[:, 2])], -1),
        noise=uniform("noise", 1, 5, 5) - 0.5, rough=between(0.05, 0.12, light[:, 3]))
    bone, t = (torch.tensor(x, device=index.device) for x in zip(*KEYPOINT_BONES))
    points = torch.stack([*point_on_axis(bones[:, :, bone], t), (~absent[:, :, bone]).double()], -1)
    return {name: x.float() for name, x in scene.items()}, cls, pattern, points.float()


# ---- rendering: spindles -> pixels ---------------------------------------------------------------


def equations(s):
    """Spindles (..., 10) -> (..., 11), the coefficients that `distance` needs: t along the axis and
    the offset across it as a x + b y + c (three each), -bend, length^2, r0, -r1, -r2."""
    x, y, cos, sin, side, length, r0, r1, r2, bend = s.unbind(-1)
    return torch.stack([cos / length, sin / length, -(cos * x + sin * y) / length,
                        -sin * side, cos * side, (sin * x - cos * y) * side,
                        -bend, length**2, r0, -r1, -r2], -1)


def plane(a, b, c, grid):
    """a x + b y + c at every pixel: (..., 1, 1) each, grid (S,) -> (..., S, S)."""
    return (a * grid + c) + b * grid[:, None]


def distance(e, grid):
    """Signed distance (inside < 0) of pixels to n spindles: (B, n, 11), (S,) -> (B, n, S, S)."""
    e = e[..., None, None].unbind(2)                                # eleven of (B, n, 1, 1)
    t, across = plane(*e[:3], grid), plane(*e[3:6], grid)         # t is 0 at the root, 1 at the tip
    inside = t.clamp(0, 1)
    square = inside * inside
    across.addcmul_(square, e[6])                                   # measured from the bent axis
    t.sub_(inside).mul_(t)                                          # beyond the ends, squared
    d = across.mul_(across).addcmul_(t, e[7]).sqrt_()
    return d.sub_(e[8]).addcmul_(inside, e[9]).addcmul_(square, e[10])          # minus the radius


def render(scene, size, annotate):
    """Scene parameters of B images -> images (B, 3, S, S), instances and parts (B, S, S), uint8."""
    B, n_creatures = scene["coat"].shape[:2]
    grid = (torch.arange(size, device=scene["sky"].device) + 0.5) * (2 / size) - 1  # pixel centers
    without_pixels = ("bones", "objects", "noise", "coat")
    w = {name: x if name in without_pixels else x[..., None, None] for name, x in scene.items()}
    instances, parts = (grid.new_zeros(B, size, size, dtype=torch.uint8) for _ in range(2))

    def draw_layer(d, color, instance=0, part=0):
        cover = (d * (-size / 2)).add_(0.5).clamp_(0, 1)            # an edge is one pixel wide
        canvas.lerp_(color, cover)
        if annotate:
            instances.masked_fill_(d[:, 0] < 0, instance)
            parts.masked_fill_(d[:, 0] < 0, part)
        return cover

    ramp = plane(w["ramp"][:, 0], w["ramp"][:, 1], 0.5, grid)[:, None].clamp_(0, 1)
    canvas = torch.lerp(w["sky"][:, 0], w["sky"][:, 1], ramp)                   # (B, 3, S, S)
    ground = plane(w["ground"][:, 1], -1, w["ground"][:, 0], grid)
    noise = F.interpolate(w["noise"], size=(size, size), mode="bilinear")
    draw_layer(ground[:, None], w["sky"][:, 2])
    objects = [d[:, None] for i in range(0, CLUTTER + FRONT, 3)
               for d in distance(w["objects"][:, i:i + 3], grid).unbind(1)]
    for i in range(CLUTTER):
        draw_layer(objects[i], w["object_color"][:, i])
    canvas.mul_((noise * w["rough"][:, None]).add_(1))

    for k in range(n_creatures):
        bones = w["bones"][:, k]
        exists = (bones[..., 8] > -9).any(0).tolist()               # in at least one of the images
        cover, height = torch.zeros_like(ramp), torch.zeros_like(ramp)
        x, y = (plane(*axis.unbind(1), grid) for axis in w["coat_axes"][:, k].unbind(1))
        waves = [(z * math.pi + phase).sin_().mul_(0.2)             # stripes are not straight
                 for z, phase in zip((y, x), w["wave"][:, k].unbind(1))]
        mark = F.grid_sample(w["coat"][:, k], torch.stack([x + waves[0], y + waves[1]], -1),
                             padding_mode="reflection", align_corners=False)
        coat = torch.lerp(*w["coat_colors"][:, k].unbind(1), mark)              # (B, 3, S, S)
        colors = {brightness: coat * brightness for brightness in (0.75, 1)}
        colors |= {gray: grid.new_tensor(gray) for *_, gray in LAYERS[FIRST_EYE_LAYER:]}
        bulge = -1 / (0.22 * w["size"][:, k, None])
        for i, (part, low, high, brightness) in enumerate(LAYERS):
            if i == FIRST_EYE_LAYER:
                apply_light(canvas, cover, height, w, k)
            high = max([low, *(j + 1 for j in range(low, high) if exists[j])])
            if high > low:
                d = distance(bones[:, low:high], grid).amin(1, keepdim=True)    # of their union
                part_id = PARTS.index("head" if part == "eye" else part) + 1
                c = draw_layer(d, colors[brightness], k + 1, part_id)
                height.lerp_(d.mul_(bulge).clamp_(0, 1), c)         # each part is a dome
                torch.maximum(cover, c, out=cover)
    for i in range(CLUTTER, CLUTTER + FRONT):
        draw_layer(objects[i], w["object_color"][:, i])
    canvas.mul_(w["light"][:, 3:4] * 255).add_(0.5).clamp_(0, 255)
    return canvas.to(torch.uint8), instances, parts


def apply_light(canvas, cover, height, w, k):
    """Multiplies the canvas by the outline and the relief shading of creature k, in place."""
    size = canvas.shape[-1]
    step = max(1, size // 64)                       # in pixels, so that slopes are size-independent
    sun = w["light"] * (size / step) * 0.06
    dome = height * (2 - height)
    relief = (dome - dome.roll(step, 3)) * sun[:, 0, None]
    relief.addcmul_(dome - dome.roll(step, 2), sun[:, 1, None])
    relief.mul_(w["light"][:, 2, None] * w["size"][:, k, None]).add_(1)
    outline = (height * 5).clamp_(0, 1).mul_(0.35).add_(0.65)
    canvas.mul_(relief.mul_(outline).sub_(1).mul_(cover).add_(1))


def sample_and_render(index, split, size, seed, kind, annotate, time=None, cue_conflict=False):
    """Images, instances, parts (see `render`), classes, patterns and keypoints (see
    `sample_scene`)."""
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"toy: index must be a one-dimensional int64 tensor, not "
                         f"{index.dtype} of shape {tuple(index.shape)}; try torch.arange(16)")
    if split not in NUM_IMAGES:
        raise ValueError(f"toy: no split {split!r}; choose {' or '.join(NUM_IMAGES)}")
    scene, cls, pattern, points = sample_scene(index, split, seed, kind, time, cue_conflict)
    out = [torch.empty(len(index), *shape, size, size, dtype=torch.uint8, device=index.device)
           for shape in ((3,), (), ())]
    # Rendered in blocks that fit the cache, sorted by class, so that bones are skipped that no
    # image of a block has.
    block = max(1, (1 << (16 if index.device.type == "cpu" else 23)) // size**2)
    for rows in cls[:, 0].argsort(stable=True).split(block):
        rendered = render({name: x[rows] for name, x in scene.items()}, size, annotate)
        for whole, part in zip(out, rendered):
            whole[rows] = part
    return *out, cls, pattern, points


# ---- images --------------------------------------------------------------------------------------


def draw(index, split="train", size=64, scenes=False, annotate=False, seed=0, cue_conflict=False):
    """(B,) int64 indices of images -> dict of tensors. An image has 1 creature, a scene 2 to 4.
    cue_conflict: every creature wears the typical pattern of another class.

    "image" (B, 3, S, S) uint8, "label" (B,) int64, the class, and "pattern" (B,) int64, the class
    whose typical pattern the creature wears (of a scene: both of the creature with most visible
    pixels). annotate adds, for what is visible,
    "instances", "parts", "semantic" (B, S, S) uint8: creature 1, 2, ..., far to near; part 1, 2,
                 ...; class + 1; 0 is background
    "keypoints"  (B, creatures, parts, 3) float32: x, y in pixels; v: 0 not labeled (no such part,
                 or nothing of the creature is visible), 1 occluded, 2 visible
    "boxes"      (B, creatures, 4) float32: x0, y0, x1, y1 in pixels, zeros if nothing is visible
    "classes"    (B, creatures) int64, -1 if nothing is visible.
    ValueError: index is not (B,) int64, or there is no such split."""
    image, instances, parts, cls, pattern, points = sample_and_render(
        index, split, size, seed, "scene" if scenes else "single", annotate or scenes,
        cue_conflict=cue_conflict)
    if not (annotate or scenes):
        return {"image": image, "label": cls[:, 0], "pattern": pattern[:, 0]}
    number = torch.arange(1, cls.shape[1] + 1, device=index.device)[:, None, None]
    masks = instances[:, None] == number                                # (B, creatures, S, S)
    area = masks.sum((2, 3))
    largest = area.argmax(1, keepdim=True)
    out = {"image": image, "label": cls.gather(1, largest)[:, 0],
           "pattern": pattern.gather(1, largest)[:, 0]}
    if not annotate:
        return out
    classes = torch.where(area > 0, cls, -1)
    semantic = F.pad(classes + 1, (1, 0)).gather(1, instances.flatten(1).long())
    columns, rows = masks.any(2).byte(), masks.any(3).byte()
    boxes = torch.stack([columns.argmax(2), rows.argmax(2), size - columns.flip(2).argmax(2),
                         size - rows.flip(2).argmax(2)], -1) * (area > 0)[..., None]
    xy = (points[..., :2] + 1) * (size / 2)
    column, row = xy.floor().long().unbind(-1)                          # (B, creatures, parts)
    inside = (column.clamp(0, size - 1) == column) & (row.clamp(0, size - 1) == row)
    pixel = (row * size + column).masked_fill(~inside, 0).flatten(1)
    part = torch.arange(1, len(PARTS) + 1, device=index.device)
    visible = inside & (instances.flatten(1).gather(1, pixel).view_as(inside) == number[..., 0])
    visible &= parts.flatten(1).gather(1, pixel).view_as(inside) == part
    v = points[..., 2] * (1 + visible) * (area > 0)[..., None]
    return out | {"instances": instances, "parts": parts, "classes": classes,
                  "semantic": semantic.view_as(instances).to(torch.uint8),
                  "boxes": boxes.float(), "keypoints": torch.cat([xy, v[..., None]], -1)}


# ---- video ---------------------------------------------------------------------------------------


def video(index, frames=16, split="test", size=64, scenes=True, seed=0):
    """(B,) int64 indices of videos -> dict: "image" (B, frames, 3, S, S), "instances", "parts" (B,
    frames, S, S), all uint8, and "classes" (B, creatures) int64, -1 for none. A scene has 2 or 3
    creatures; without scenes there is 1.

    The creatures walk, two creatures of a scene cross, the camera drifts, and instance ids do not
    change. `frames` is the temporal resolution: the motion does not depend on it."""
    time = torch.linspace(0, 1, frames, device=index.device, dtype=torch.float64).repeat(len(index))
    image, instances, parts, cls, *_ = sample_and_render(
        index.repeat_interleave(frames), split, size, seed, "video" if scenes else "single", True,
        time)
    out = {"image": image, "instances": instances, "parts": parts}
    out = {name: x.unflatten(0, (len(index), frames)) for name, x in out.items()}
    return out | {"classes": cls[::frames]}


# ---- contact sheet -------------------------------------------------------------------------------


def overlay(image, ids, points=()):
    """Image (3, S, S) uint8, ids (S, S), points (n, 3) -> (3, S, S) uint8: the image, darker, with
    a color for each id (colors.class_colors) and a cross at each visible point."""
    color = class_colors()[ids.long()].permute(2, 0, 1).float()
    out = torch.where(ids == 0, image * 0.4, image * 0.35 + color * 0.65).to(torch.uint8)
    for x, y, v in points:
        if v == 2:
            x, y = int(x), int(y)
            out[:, y, max(0, x - 1):x + 2] = out[:, max(0, y - 1):y + 2, x] = 255
    return out


def contact_sheet(size=80, seed=0):
    """PIL image: six images of each class; scenes with instances, parts, keypoints; a video."""
    from PIL import Image, ImageDraw
    cls = sample_scene(torch.arange(1000), "train", seed, "single")[1][:, 0]
    rows = []                                             # left label, middle label, twelve images
    for pair in zip(CLASSES[::2], CLASSES[1::2]):
        index = [(cls == CLASSES.index(name)).nonzero()[:6, 0] for name in pair]
        rows.append((*pair, draw(torch.cat(index), "train", size, seed=seed)["image"]))
    scene = draw(torch.arange(8), "train", size, scenes=True, annotate=True, seed=seed)
    for part in range(0, 8, 2), range(1, 8, 2):
        cells = [(image, overlay(image, scene["instances"][i]),
                  overlay(image, scene["parts"][i], scene["keypoints"][i].flatten(0, 1)))
                 for i in part for image in [scene["image"][i]]]
        rows.append(("scenes", "scenes", torch.stack(sum(cells, ()))))
    clip = {name: x[0] for name, x in video(torch.arange(1), 12, "train", size, seed=seed).items()}
    masks = [overlay(*pair) for pair in zip(clip["image"], clip["instances"])]
    rows += [("video", "video", clip["image"]), ("masks", "masks", torch.stack(masks))]
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
    print(f"wrote {path}: {len(CLASSES)} classes, scenes with instances and parts, a video")
