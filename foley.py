"""The procedural Foley set: short videos of a small world in which things happen and the sound follows physically.

In:  a seed and a clip number. Clip i of seed S is a pure function of (S, i, size, fps, duration).
Out: OUT/00000.mp4 (H.264 and AAC mono 16 kHz, both starting at 0 and equally long) and OUT/00000.json:
     {"onsets": [{"time", "material", "strength", "kind", "other"}, ...], "sustained": [{"start", "end", ...}], ...}.
     An onset's time is the instant of first contact in seconds, its strength the loudness of the hit, 0 to 1.

    python foley.py OUT --clips 1000 --seed 0

The paper trains on VGGSound (section 4.1); this set stands in for it where true onset times are needed.
A world is sprites (what is drawn, one position per frame), impacts and rubs (what sounds and is labelled), all read off
the same trajectories, so picture, sound and label cannot disagree. Sound is modal synthesis: a material has resonances,
damping and contact noise; size lowers the pitch, impact speed sets loudness and brightness, both touching bodies ring.
Lengths are in picture widths, y points down, times are seconds, speeds picture widths a second.
"""

import argparse
import json
import math
import multiprocessing
import signal
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from common.media import SAMPLE_RATE, MediaError, atomic_write

FINE = 1000  # positions and speeds a second, where a trajectory has no closed form
FAINTEST = 0.07  # impacts weaker than this (-23 dB) neither sound nor are labelled
LOUDEST_SPEED = 2.0  # an impact at this speed or more has strength 1


# ------------------------------------------------------------------------------------------------------------ materials


class Material(NamedTuple):
    colour: tuple  # RGB in [0, 1]
    second: tuple  # the pattern's other colour
    pattern: str
    shine: float  # highlight, 0 to 1
    bounce: float  # restitution
    pitch: float  # lowest resonance in Hz of a body of half-size 0.08
    decay: float  # seconds until the lowest resonance has fallen by 60 dB
    tilt: float  # how fast higher resonances weaken
    hiss: float  # contact noise relative to the resonances
    hiss_pitch: float  # its centre in Hz
    hiss_decay: float  # its time constant in seconds
    ratios: tuple  # resonances relative to the lowest


MATERIALS = {
    "wood": Material(
        (0.64, 0.42, 0.22),
        (0.42, 0.25, 0.12),
        "grain",
        0.15,
        0.55,
        380,
        0.22,
        0.7,
        0.5,
        900,
        0.010,
        (1, 2.6, 4.3, 6.1),
    ),
    "metal": Material(
        (0.74, 0.77, 0.82),
        (0.50, 0.54, 0.62),
        "brushed",
        0.9,
        0.60,
        950,
        1.3,
        0.4,
        0.2,
        4000,
        0.004,
        (1, 2.76, 5.4, 8.9),
    ),
    "brass": Material(
        (0.90, 0.68, 0.20),
        (0.66, 0.44, 0.08),
        "rings",
        0.8,
        0.50,
        480,
        2.2,
        0.3,
        0.1,
        3000,
        0.004,
        (1, 1.5, 2, 2.74, 3.76),
    ),
    "glass": Material(
        (0.80, 0.95, 0.97),
        (0.30, 0.62, 0.74),
        "rim",
        1.0,
        0.50,
        2100,
        0.7,
        0.3,
        0.15,
        5500,
        0.003,
        (1, 1.6, 2.32, 3.3),
    ),
    "ceramic": Material(
        (0.96, 0.95, 0.90),
        (0.16, 0.30, 0.75),
        "band",
        0.7,
        0.45,
        1250,
        0.28,
        0.4,
        0.35,
        3500,
        0.005,
        (1, 1.83, 2.9, 4.2),
    ),
    "rubber": Material(
        (0.78, 0.14, 0.16),
        (0.50, 0.06, 0.10),
        "dots",
        0.1,
        0.80,
        115,
        0.22,
        1.3,
        0.2,
        250,
        0.020,
        (1, 1.6, 2.3),
    ),
    "plastic": Material(
        (0.25, 0.80, 0.32),
        (0.95, 0.95, 0.30),
        "halves",
        0.45,
        0.68,
        640,
        0.10,
        0.7,
        0.4,
        1800,
        0.006,
        (1, 1.7, 2.4, 3.9),
    ),
    "stone": Material(
        (0.46, 0.45, 0.44),
        (0.26, 0.25, 0.27),
        "mottle",
        0.0,
        0.40,
        2500,
        0.06,
        0.3,
        1.0,
        2800,
        0.012,
        (1, 1.41, 1.93, 2.6),
    ),
    "cardboard": Material(
        (0.78, 0.60, 0.38),
        (0.90, 0.84, 0.68),
        "tape",
        0.0,
        0.25,
        170,
        0.14,
        1.0,
        1.6,
        520,
        0.030,
        (1, 1.9, 2.7),
    ),
    "water": Material(
        (0.16, 0.42, 0.70),
        (0.30, 0.60, 0.85),
        "waves",
        0.3,
        0.0,
        700,
        0.18,
        0.0,
        0.12,
        2500,
        0.008,
        (1,),
    ),
    # of set "other" alone: what a model trained on the usual set has never seen or heard
    "bell": Material(
        (0.50, 0.33, 0.12),
        (0.28, 0.36, 0.26),
        "rings",
        0.7,
        0.45,
        720,
        3.0,
        0.25,
        0.05,
        4500,
        0.003,
        (1, 1.2, 1.5, 2, 2.67, 4),
    ),
    "ice": Material(
        (0.86, 0.93, 1.0),
        (0.60, 0.76, 0.95),
        "mottle",
        0.8,
        0.35,
        3300,
        0.10,
        0.5,
        0.9,
        5800,
        0.008,
        (1, 1.87, 2.71, 3.5),
    ),
    "drum": Material(
        (0.93, 0.86, 0.72),
        (0.45, 0.08, 0.10),
        "band",
        0.1,
        0.70,
        140,
        0.50,
        0.8,
        0.3,
        700,
        0.010,
        (1, 1.59, 2.14, 2.3, 2.65, 2.92),
    ),
    "bamboo": Material(
        (0.80, 0.74, 0.34),
        (0.47, 0.44, 0.16),
        "halves",
        0.3,
        0.55,
        620,
        0.09,
        0.6,
        0.8,
        1500,
        0.008,
        (1, 2.32, 3.9, 5.2),
    ),
}
OTHER = ("bell", "ice", "drum", "bamboo")
SOLIDS = {
    "usual": tuple(name for name in MATERIALS if name not in ("water", *OTHER)),
    "other": OTHER,
}
FLOORS = ("wood", "stone", "ceramic", "metal", "rubber")


class Thing(NamedTuple):
    """A sounding body: what it is made of, its half-size, and its own slight detuning, which all its hits share."""

    material: str
    size: float
    detune: tuple

    @classmethod
    def make(cls, rng, material, size):
        return cls(
            material, size, tuple(1 + 0.015 * rng.standard_normal(len(MATERIALS[material].ratios)))
        )


# --------------------------------------------------------------------------------------------- what a world consists of


class Impact(NamedTuple):
    time: float
    x: float  # where it happens, -1 if above the picture: what nobody sees is left out
    speed: float  # closing speed
    kind: str  # bounce, wall, collision, hammer, drip
    thing: Thing  # what rings, and names the label's material
    other: Thing  # what also rings, more softly

    @property
    def strength(self):
        return min(1.0, (self.speed / LOUDEST_SPEED) ** 1.3)


class Rub(NamedTuple):
    """Rolling or scraping: sounds while it moves, as loud as it is fast."""

    start: float
    speed: np.ndarray  # FINE values a second
    kind: str  # roll, scrape
    thing: Thing


@dataclass
class Sprite:
    """A rounded box (a disc if it has no straight sides) with a material's look. Every number may be one per frame."""

    look: Material
    x: np.ndarray
    y: np.ndarray
    half: tuple  # straight part, half width and half height
    round: float  # corner radius
    angle: np.ndarray = 0.0
    alpha: np.ndarray = 1.0


@dataclass
class World:
    floor: float  # height of the floor's edge
    ground: Thing  # the floor itself
    times: np.ndarray  # of the frames (f,)
    duration: float
    solids: tuple = SOLIDS["usual"]  # what things are made of
    scenery: list = field(default_factory=list)  # sprites that never move
    sprites: list = field(default_factory=list)  # sprites that may, drawn in this order
    impacts: list = field(default_factory=list)
    rubs: list = field(default_factory=list)
    tangled: bool = False  # bodies leaning on each other without end: a world to throw away

    def audible(self):
        """The impacts that sound and are labelled: seen, not faint, not lost in a far louder one just before."""
        kept = []
        for hit in sorted(self.impacts):
            seen = (
                0.02 < hit.x < 0.98
                and 0.05 < hit.time < self.duration - 0.1
                and hit.strength >= FAINTEST
            )
            if seen and not any(
                hit.time - k.time < 0.06 and hit.strength < 0.4 * k.strength for k in kept[-4:]
            ):
                kept.append(hit)
        return kept


def jitter(rng, material):
    """The material's look with its colours a little off, as two wooden things differ."""
    look, shift = MATERIALS[material], 0.03 * rng.standard_normal(3) + 0.05 * rng.standard_normal()
    colour, second = (tuple(np.clip(c + shift, 0, 1)) for c in (look.colour, look.second))
    return look._replace(colour=colour, second=second)


def plain(colour, shine=0.0):
    return MATERIALS["plastic"]._replace(
        colour=tuple(colour), second=tuple(colour), pattern="plain", shine=shine
    )


def thread(x, y, alpha=1.0):
    """A line from the top of the picture down to y."""
    return Sprite(
        plain((0.2, 0.2, 0.2)), x, y / 2, (0.002, np.maximum(y / 2, 0.01)), 0.004, 0.0, alpha
    )


def body_sprite(look, ball, size, x, y, angle=0.0, alpha=1.0):
    straight = 0.0 if ball else 0.8 * size
    return Sprite(look, x, y, (straight, straight), size - straight, angle, alpha)


# ----------------------------------------------------------------------------------------------------- bodies in flight


class Piece(NamedTuple):
    """A stretch of constant acceleration, from `time` until the next piece."""

    time: float
    x: float
    y: float
    vx: float
    vy: float
    ax: float
    ay: float

    def at(self, time):
        s = time - self.time
        return (
            self.x + self.vx * s + self.ax * s * s / 2,
            self.y + self.vy * s + self.ay * s * s / 2,
            self.vx + self.ax * s,
            self.vy + self.ay * s,
        )


@dataclass
class Body:
    thing: Thing
    ball: bool
    pieces: list  # Piece, in time order
    release: float = math.inf  # when it is let go, if it is held
    throw: tuple = (0.0, 0.0)  # the velocity it then gets

    def moved(self, time, vx, vy, gravity, x, y, rests):
        """Goes on from (x, y) with a new velocity; down on the floor, a ball rolls on, a box scrapes to a stop."""
        self.release = math.inf
        brake = (0.18 if self.ball else 0.9) if rests else 0.0
        self.pieces.append(
            Piece(
                time,
                x,
                y,
                vx,
                0.0 if rests else vy,
                -brake * np.sign(vx),
                0.0 if rests else gravity,
            )
        )

    def track(self, times):
        """Positions and velocities (4, f) at all `times`."""
        starts = np.array([p.time for p in self.pieces])
        rows = np.array(self.pieces)[
            np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)
        ]  # (f, 7)
        return np.stack(Piece(*rows.T).at(times))


def first_root(a, b, c):
    """The smallest s > 0 at which a s^2 + b s + c falls to zero from above."""
    if abs(a) < 1e-12:
        s = -c / b if b < 0 else math.inf
        return s if s > 1e-9 else math.inf
    root = b * b - 4 * a * c
    if root < 0:
        return math.inf
    both = [(-b + sign * math.sqrt(root)) / (2 * a) for sign in (-1, 1)]
    return min((s for s in both if s > 1e-7 and 2 * a * s + b < 0), default=math.inf)


def next_contact(body, box):
    """When the body's present piece ends on floor, wall or at rest: (time, what)."""
    p, r, (left, right, floor) = body.pieces[-1], body.thing.size, box
    if body.release < math.inf:
        return body.release, "release"
    options = [
        (first_root(-p.ay / 2, -p.vy, floor - r - p.y), "floor") if p.ay else (math.inf, ""),
        (first_root(p.ax / 2, p.vx, p.x - r - left), "left"),
        (first_root(-p.ax / 2, -p.vx, right - r - p.x), "right"),
    ]
    if p.ax:
        options.append((-p.vx / p.ax, "stop"))
    wait, what = min(options)
    return p.time + wait, what


def next_meeting(a, b, now, until):
    """When two bodies touch within (now, until): their gap is sampled finely, then interpolated."""
    s = np.arange(max(now, 0.0) + 1e-4, until + 0.004, 0.004)
    if len(s) < 2:
        return math.inf
    (xa, ya, *_), (xb, yb, *_) = a.pieces[-1].at(s), b.pieces[-1].at(s)
    gap = np.hypot(xa - xb, ya - yb) - a.thing.size - b.thing.size
    hits = np.flatnonzero((gap[1:] <= 0) & (gap[1:] < gap[:-1]))
    if not len(hits):
        return math.inf
    k = hits[0]
    return float(s[k] + 0.004 * max(gap[k], 0) / max(gap[k] - gap[k + 1], 1e-9))


def collide(a, b, time, gravity, floor):
    """Two balls exchange momentum along the line of their centres (mass as area). Returns place and closing speed."""
    (xa, ya, vxa, vya), (xb, yb, vxb, vyb) = a.pieces[-1].at(time), b.pieces[-1].at(time)
    n = np.array([xb - xa, yb - ya]) / max(math.hypot(xb - xa, yb - ya), 1e-9)
    closing = max((vxa - vxb) * n[0] + (vya - vyb) * n[1], 0.0)
    bounce = math.sqrt(MATERIALS[a.thing.material].bounce * MATERIALS[b.thing.material].bounce)
    sides, give = [], 0.0
    for body, y, push in ((a, ya, -n), (b, yb, n)):
        grounded = body.pieces[-1].ay == 0 and y > floor - body.thing.size - 1e-3
        if grounded and push[1] > 0:
            push = push * (1, 0)  # the floor takes what presses down on it
        sides.append((grounded, push / body.thing.size**2))
        give += push @ push / body.thing.size**2
    impulse = (closing * (1 + bounce) + 0.05) / max(
        give, 1e-9
    )  # a little push keeps bodies from leaning
    for body, x, y, vx, vy, (grounded, kick) in (
        (a, xa, ya, vxa, vya, sides[0]),
        (b, xb, yb, vxb, vyb, sides[1]),
    ):
        vx, vy = vx + impulse * kick[0], vy + impulse * kick[1]
        body.moved(
            time,
            vx,
            vy,
            gravity,
            x,
            floor - body.thing.size if grounded else y,
            grounded and vy > -0.2,
        )
    return (xa + xb) / 2 if ya + yb > 0 else -1.0, closing


def simulate(bodies, world, gravity, left, right, post):
    """Moves the bodies from contact to contact until the clip ends; the world gets all impacts and rubs."""
    box = (left, right, world.floor)
    for _ in range(300):
        ends = [next_contact(body, box) + (i,) for i, body in enumerate(bodies)]
        now, what, i = min(ends)
        for j, a in enumerate(bodies):
            for k, b in enumerate(bodies[:j]):
                meeting = next_meeting(
                    a, b, max(a.pieces[-1].time, b.pieces[-1].time), min(now, world.duration)
                )
                if meeting < now:
                    now, what, i = meeting, "meet", (j, k)
        if now > world.duration:
            break
        if what == "meet":
            a, b = bodies[i[0]], bodies[i[1]]
            x, speed = collide(a, b, now, gravity, world.floor)
            world.impacts.append(Impact(now, x, speed, "collision", a.thing, b.thing))
            continue
        body = bodies[i]
        x, y, vx, vy = body.pieces[-1].at(now)
        bounce, size = MATERIALS[body.thing.material].bounce, body.thing.size
        grounded = body.pieces[-1].ay == 0
        if what == "floor":
            world.impacts.append(Impact(now, x, vy, "bounce", body.thing, world.ground))
            rests = (
                2 * bounce * vy / gravity < 0.16
            )  # the next hop would be too short to see: it stays down
            body.moved(
                now,
                vx * (0.9 if body.ball else 0.6),
                -bounce * vy,
                gravity,
                x,
                world.floor - size,
                rests,
            )
        elif what == "release":
            body.moved(now, *body.throw, gravity, x, y, False)
        elif what == "stop":
            body.pieces.append(Piece(now, x, y, 0.0, 0.0, 0.0, 0.0))
        else:
            world.impacts.append(
                Impact(now, x if y > 0 else -1.0, abs(vx), "wall", body.thing, post)
            )
            body.moved(now, -bounce * vx, vy, gravity, x, y, grounded)
    else:
        world.tangled = True
    for body in bodies:
        for p, after in zip(body.pieces, body.pieces[1:] + [None]):
            end = min(after.time if after else world.duration, world.duration)
            if p.ax and end - p.time > 0.05:
                speed = np.abs(p.at(np.arange(p.time, end, 1 / FINE))[2])
                if speed.max() > 0.08:
                    world.rubs.append(
                        Rub(p.time, speed, "roll" if body.ball else "scrape", body.thing)
                    )


# ------------------------------------------------------------------------------- acts: each fills one lane of the stage


def posts(world, rng, left, right, height):
    """A wall at each side of the lane, standing on the floor."""
    material = str(rng.choice(["wood", "stone", "metal", "plastic"]))
    for x in (left, right):
        world.scenery.append(
            Sprite(jitter(rng, material), x, world.floor - height / 2, (0.008, height / 2), 0.012)
        )
    return Thing.make(rng, material, 0.12)


def shadow(world, x, y, size):
    """Darkens the floor's edge under a body, the more the nearer it is: a cue to contact."""
    near = np.clip(1 - (world.floor - y - size) / 0.3, 0, 1)
    dark = 0.55 * near * (y < world.floor)
    return Sprite(plain((0, 0, 0)), x, world.floor + 0.008, (0.8 * size, 0.0), 0.008, 0.0, dark)


def act_bodies(world, rng, left, right):
    """One to three balls, or one box, let go or thrown in: they fall, bounce, collide, roll or scrape to rest."""
    ball = rng.random() < 0.75
    count = int(rng.choice([1, 2, 3], p=[0.35, 0.5, 0.15])) if ball and right - left > 0.4 else 1
    walled = count > 1 or rng.random() < 0.85
    post = posts(world, rng, left, right, world.floor) if walled else world.ground
    bounds = (left + 0.02, right - 0.02) if walled else (-9.0, 9.0)
    gravity, bodies, looks = rng.uniform(1.5, 4.5), [], []
    target = (
        count > 1 and rng.random() < 0.7
    )  # the first ball lies there, the others are thrown at it
    unfit = ("cardboard",) if ball else ("rubber", "glass")
    for place in rng.permutation(count):
        size = min(rng.uniform(0.05, 0.11), 0.42 * (right - left) / count)
        x = left + 0.02 + (right - left - 0.04) * (place + rng.uniform(0.4, 0.6)) / count
        thing = Thing.make(rng, str(rng.choice([m for m in world.solids if m not in unfit])), size)
        release = rng.uniform(0.2, 0.62 * world.duration)
        looks, lies, hung = (
            looks + [jitter(rng, thing.material)],
            target and not bodies,
            rng.random() < 0.45,
        )
        y, throw = -size - 0.02, (rng.uniform(-0.7, 0.7), rng.uniform(0, 0.8))
        if target and bodies and not hung:
            throw = (
                (bodies[0].pieces[0].x - x)
                * rng.uniform(0.6, 1.2)
                * math.sqrt(gravity / 2 / world.floor),
                0.0,
            )
        if lies:
            y, release = world.floor - size, math.inf
        elif hung:
            y, throw = rng.uniform(size + 0.06, world.floor - size - 0.15), (0.0, 0.0)
        bodies.append(Body(thing, bool(ball), [Piece(-1.0, x, y, 0, 0, 0, 0)], release, throw))
    simulate(bodies, world, gravity, *bounds, post)
    for body, look in zip(bodies, looks):
        x, y, _, _ = body.track(world.times)
        angle = (x - x[0]) / body.thing.size if ball else 0.0
        first, loose = body.pieces[0], body.pieces[1].time if body.pieces[1:] else world.duration
        if 0 < first.y < world.floor - body.thing.size:  # hung: its thread shows until it falls
            world.sprites.append(thread(first.x, first.y - body.thing.size, world.times < loose))
        world.sprites += [
            shadow(world, x, y, body.thing.size),
            body_sprite(look, ball, body.thing.size, x, y, angle),
        ]


def rhythm(rng, duration, shortest):
    """Irregular instants, or a beat with a little play, at least `shortest` apart."""
    now, beat, times = (
        rng.uniform(0.6, 2.5),
        rng.uniform(shortest + 0.1, 1.3) if rng.random() < 0.3 else 0.0,
        [],
    )
    while now < duration - 0.3:
        times.append(now)
        now += max(
            shortest, beat * rng.uniform(0.93, 1.07) if beat else shortest + rng.exponential(0.9)
        )
        if rng.random() < 0.1:
            now += rng.uniform(0.5, 2.5)
    return times


def ease(u):
    """From 0 to 1 with a soft start and end."""
    return (1 - np.cos(np.pi * u)) / 2


def act_hammer(world, rng, left, right):
    """A mallet strikes a plate on the floor; some swings stop short of it and make no sound."""
    width, middle, floor = right - left, (left + right) / 2, world.floor
    plate = Thing.make(
        rng, str(rng.choice(world.solids)), min(rng.uniform(0.09, 0.18), 0.32 * width)
    )
    head = Thing.make(
        rng,
        str(rng.choice(["wood", "metal", "rubber", "stone", "plastic"])),
        rng.uniform(0.045, 0.075),
    )
    thick, arm, side = (
        rng.uniform(0.025, 0.045),
        min(rng.uniform(0.25, 0.45), 0.6 * width),
        rng.choice([-1, 1]),
    )
    top, flat = floor - 0.03 - 2 * thick, (plate.size - 0.01, thick - 0.01)
    world.scenery.append(Sprite(jitter(rng, plate.material), middle, top + thick, flat, 0.01))
    for foot in (middle - 0.6 * plate.size, middle + 0.6 * plate.size):
        world.scenery.append(
            Sprite(plain((0.25, 0.25, 0.28)), foot, floor - 0.015, (0.01, 0.01), 0.005)
        )
    rest, fine = rng.uniform(0.35, 0.6), np.arange(round(world.duration * FINE)) / FINE
    angle, last = np.full(len(fine), rest), 0.0  # 0 is on the plate, positive above it
    for time in rhythm(rng, world.duration, 0.32):
        raised, swing = rng.uniform(0.45, 1.2), min(rng.uniform(0.09, 0.2), 0.3 * (time - last))
        wind, misses = min(0.35, 0.35 * (time - last)), rng.random() >= 0.85
        lowest = rng.uniform(0.22, 0.3) if misses else 0.0

        def phase(start, length):
            return np.clip((fine - start) / length, 0, 1)

        up = ease(phase(time - swing - wind, wind))
        down = (
            ease(phase(time - swing, swing)) if misses else phase(time - swing, swing) ** 2
        )  # braked, or not
        angle = np.where(fine > time - swing - wind, rest + (raised - rest) * up, angle)
        angle = np.where(fine > time - swing, raised + (lowest - raised) * down, angle)
        angle = np.where(
            fine > time, lowest + (rest - lowest) * (1 - (1 - phase(time, 0.22)) ** 2), angle
        )
        if not misses:
            speed = 0.22 * 2 * raised * arm / swing  # a mallet carries less than a falling body
            world.impacts.append(Impact(time, middle, speed, "hammer", plate, head))
        last = time
    angle = np.interp(world.times, fine, angle)
    pivot, level = middle - side * arm, top - head.size
    x, y, turn = pivot + side * arm * np.cos(angle), level - arm * np.sin(angle), -side * angle
    world.scenery.append(
        Sprite(
            plain((0.3, 0.3, 0.33)), pivot, (level + floor) / 2, (0.004, (floor - level) / 2), 0.008
        )
    )
    world.sprites.append(
        Sprite(
            plain((0.45, 0.32, 0.2)),
            (x + pivot) / 2,
            (y + level) / 2,
            (arm / 2, 0.002),
            0.009,
            turn,
        )
    )
    half = (head.size * 0.4, head.size * 0.75)
    world.sprites.append(Sprite(jitter(rng, head.material), x, y, half, head.size * 0.25, turn))


def act_drip(world, rng, left, right):
    """Drops form at a tap, fall and splash into a trough of water."""
    middle, half, gravity = (
        (left + right) / 2,
        min(0.2, 0.4 * (right - left)),
        rng.uniform(1.8, 4.0),
    )
    tap, surface = rng.uniform(0.06, 0.3), world.floor - rng.uniform(0.05, 0.12)
    look, deep = jitter(rng, "water"), (world.floor - surface) / 2
    rim = jitter(rng, str(rng.choice(["stone", "metal", "ceramic", "wood"])))
    for x in (middle - half - 0.01, middle + half + 0.01):
        world.scenery.append(
            Sprite(rim, x, world.floor - deep - 0.012, (0.004, deep + 0.002), 0.01)
        )
    world.scenery.append(Sprite(look, middle, surface + deep, (half - 0.005, deep - 0.005), 0.005))
    world.scenery.append(
        Sprite(jitter(rng, "metal"), middle, tap / 2 - 0.02, (0.02, tap / 2), 0.015)
    )
    for time in rhythm(rng, world.duration, 0.3):
        size = rng.uniform(0.022, 0.042)
        fall = math.sqrt(2 * (surface - tap - 2 * size) / gravity)
        since = world.times - (time - fall)  # since the drop let go
        y = tap + size + gravity * np.clip(since, 0, None) ** 2 / 2
        world.sprites.append(
            Sprite(
                look,
                middle,
                y,
                (0.0, 0.1 * size),
                size,
                0.0,
                np.clip(1 + since / 0.25, 0, 1) * (world.times < time),
            )
        )
        splashed, after = world.times >= time, np.clip(world.times - time, 0, None)
        hop = surface - after * (0.6 + 4 * size) + gravity * after**2
        for k in (-1, 1):  # a ripple and a droplet to each side
            x, fade = (
                middle + k * np.minimum(after * 0.35, half - 0.03),
                np.clip(1 - after / 0.5, 0, 1) * splashed,
            )
            world.sprites.append(
                Sprite(plain((0.85, 0.95, 1.0)), x, surface + 0.004, (0.012, 0.0), 0.007, 0.0, fade)
            )
            world.sprites.append(
                Sprite(
                    look,
                    middle + k * after * 0.25,
                    hop,
                    (0, 0),
                    0.3 * size + 0.006,
                    0.0,
                    splashed * (hop < surface + 0.01),
                )
            )
        bubble, basin = Thing.make(rng, "water", size), Thing.make(rng, "water", size)
        world.impacts.append(
            Impact(time, middle, gravity * fall * math.sqrt(size / 0.05), "drip", bubble, basin)
        )


def act_glide(world, rng, left, right):
    """A ball rolls, or a rod pushes a block, in smooth bursts; the end of a burst may run into a post."""
    ball = rng.random() < 0.5
    material = str(rng.choice([m for m in world.solids if not ball or m != "cardboard"]))
    thing = Thing.make(rng, material, min(rng.uniform(0.05, 0.09), 0.25 * (right - left)))
    post, size = posts(world, rng, left, right, rng.uniform(0.2, 0.45)), thing.size
    fine, bounce = np.arange(round(world.duration * FINE)) / FINE, MATERIALS[material].bounce
    low, high = left + 0.02 + size, right - 0.02 - size
    here, now, x = rng.uniform(low, high), rng.uniform(0.2, 2.0), np.zeros(len(fine))
    x += here
    while now < world.duration - 0.8:
        target, span = rng.uniform(low, high), rng.uniform(0.6, 1.8)
        wall = None
        if rng.random() < 0.45:  # aims beyond the post, so that it hits it half-way
            wall = low if rng.random() < 0.5 else high
            target = wall + 1.1 * (wall - here)
        if abs(target - here) < 0.15:
            now += 0.1
            continue
        u = np.clip((fine - now) / span, 0, 1)
        path = here + (target - here) * (u - np.sin(2 * np.pi * u) / (2 * np.pi))
        later = fine > now
        reached = (
            wall is not None and (path[-1] - wall) * np.sign(wall - here) >= 0
        )  # else the clip ends before
        if reached:
            hit = int(np.argmax((path - wall) * np.sign(wall - here) >= 0))
            time, speed = fine[hit], abs(path[hit] - path[hit - 1]) * FINE
            back = np.clip((fine - time) / 0.3, 0, 1)
            away = wall - np.sign(wall - here) * 0.5 * bounce * speed * 0.3 * (1 - (1 - back) ** 2)
            path, target, span = (
                np.where(fine < time, path, away),
                float(away[-1]),
                time + 0.3 - now,
            )
            world.impacts.append(Impact(time, wall, speed, "wall", thing, post))
        x, here = np.where(later, path, x), target
        burst = (fine >= now) & (fine < now + span)
        world.rubs.append(
            Rub(now, np.abs(np.gradient(path[burst])) * FINE, "roll" if ball else "scrape", thing)
        )
        now += span + rng.exponential(0.8) + 0.15
    x = np.interp(world.times, fine, x)
    y = world.floor - size
    if not ball and rng.random() < 0.7:
        world.sprites.append(
            Sprite(plain((0.35, 0.35, 0.4)), x, (y - size) / 2, (0.006, (y - size) / 2), 0.006)
        )
    angle = (x - x[0]) / size if ball else 0.0
    world.sprites += [
        shadow(world, x, np.full(len(x), y), size),
        body_sprite(jitter(rng, material), ball, size, x, y, angle),
    ]


def distract(world, rng):
    """Something that moves and never touches anything, and so makes no sound."""
    t, kind = world.times, rng.choice(["float", "pendulum", "bird", "car", "yoyo", "arc"])
    material, size = str(rng.choice(world.solids)), rng.uniform(0.04, 0.09)
    f, p, look, put = (
        rng.uniform(0.15, 0.7, 3),
        rng.uniform(0, 7, 3),
        jitter(rng, material),
        world.sprites.append,
    )
    if kind == "float":
        x, y = 0.5 + 0.45 * np.sin(f[0] * t + p[0]), 0.3 + 0.2 * np.sin(f[1] * 2 * t + p[1])
        colour = plain(rng.uniform(0.2, 0.95, 3))
        put(body_sprite(colour, rng.random() < 0.5, size, x, y, f[2] * 3 * t))
    elif kind == "pendulum":
        length, x0 = rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.8)
        swing = rng.uniform(0.3, 0.9) * np.sin(t * (2 + 3 * f[0]) + p[0])
        x, y = x0 + length * np.sin(swing), length * np.cos(swing)
        put(Sprite(plain((0.2, 0.2, 0.2)), (x + x0) / 2, y / 2, (0.002, length / 2), 0.004, -swing))
        put(body_sprite(look, True, size * 0.8, x, y))
    elif kind == "bird":
        x, y = (
            (rng.choice([-1, 1]) * 0.25 * f[0] * 3 * t + p[0]) % 1.4 - 0.2,
            0.15 + 0.05 * np.sin(t + p[1]),
        )
        flap = 0.6 * np.sin(t * 9 + p[2])
        for k in (-1, 1):
            put(
                Sprite(
                    plain((0.12, 0.12, 0.15)),
                    x + k * 0.03,
                    y - 0.02 * flap,
                    (0.03, 0.0),
                    0.008,
                    -k * flap,
                )
            )
    elif kind == "car":
        x, y = (rng.choice([-1, 1]) * 0.6 * f[0] * t + p[0]) % 1.8 - 0.4, world.floor - 0.16
        put(Sprite(plain(rng.uniform(0.2, 0.9, 3), 0.4), x, y, (0.09, 0.02), 0.015))
        put(Sprite(plain((0.7, 0.8, 0.9)), x, y - 0.045, (0.045, 0.015), 0.012))
        for k in (-1, 1):
            put(body_sprite(plain((0.1, 0.1, 0.1)), True, 0.024, x + k * 0.06, y + 0.035))
    elif kind == "yoyo":  # turns back in the air, always clear of the floor
        x, y = (
            rng.uniform(0.15, 0.85),
            0.35 * world.floor + 0.25 * np.cos(t * (1.5 + 4 * f[0]) + p[0]),
        )
        put(thread(x, y))
        put(body_sprite(look, True, size, x, y))
    else:  # flies through the picture and out again
        s, speed = (
            t - rng.uniform(1, max(1, world.duration - 1)),
            rng.choice([-1, 1]) * rng.uniform(0.5, 1.2),
        )
        ball, sag = rng.random() < 0.5, rng.uniform(0.2, 0.5)
        put(
            body_sprite(
                look, ball, size, 0.5 + speed * s, 0.25 + sag * s * s, 4 * s, np.abs(s) < 1.2
            )
        )


def imagine(rng, times, duration, solids):
    """One try at a world: a floor, one to three acts side by side (none in a few worlds), distractors."""
    world = World(
        rng.uniform(0.74, 0.9),
        Thing.make(rng, str(rng.choice(FLOORS)), 0.25),
        times,
        duration,
        solids,
    )
    world.scenery.append(
        Sprite(jitter(rng, world.ground.material), 0.5, world.floor + 0.5, (0.9, 0.495), 0.005)
    )
    for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.35, 0.35, 0.2, 0.1]))):
        distract(world, rng)
    lanes = int(rng.choice([0, 1, 2, 3], p=[0.05, 0.5, 0.35, 0.1]))
    for k in range(lanes):
        act = [act_bodies, act_hammer, act_drip, act_glide][
            int(rng.choice(4, p=[0.46, 0.23, 0.12, 0.19]))
        ]
        act(world, rng, 0.05 + 0.9 * k / lanes + 0.015, 0.05 + 0.9 * (k + 1) / lanes - 0.015)
    return world, lanes


def acceptable(world, lanes):
    """One to about twelve impacts, few of them crowded; or only rubbing; or a stage deliberately left empty."""
    hits = [hit.time for hit in world.audible()]
    if world.tangled:
        return False
    if lanes == 0 or not hits:
        return lanes == 0 or len(world.rubs) > 0
    gaps = np.diff(hits, prepend=-1.0)
    return (
        len(hits) <= max(3, 1.5 * world.duration)
        and gaps.min() > 0.03
        and np.mean(gaps < 0.12) <= 0.3
    )


def make_world(rng, times, duration, solids=SOLIDS["usual"]):
    """The first acceptable world that the stream of chance brings."""
    for _ in range(100):
        world, lanes = imagine(rng, times, duration, solids)
        if acceptable(world, lanes):
            break
    return world


# -------------------------------------------------------------------------------------------------------------- picture


def pattern(name, u, v):
    """How much of the second colour there is at (u, v), the body's own coordinates in [-1, 1]."""
    if name == "grain":
        return 0.5 + 0.5 * np.sin(9 * v + 1.5 * np.sin(3 * u))
    if name == "brushed":
        return 0.5 + 0.5 * np.sin(5 * (u + v))
    if name == "rings":
        return 0.5 + 0.5 * np.cos(9 * np.hypot(u, v))
    if name == "rim":
        return np.clip(
            2.5 * np.maximum(np.abs(u), np.abs(v)) ** 4 + 0.4 * (np.hypot(u, v) > 0.75), 0, 1
        )
    if name == "band":
        return (np.abs(v) < 0.28) * 1.0
    if name == "dots":
        return (np.sin(5 * u) * np.sin(5 * v) > 0.45) * 1.0
    if name == "halves":
        return (u > 0) * 1.0
    if name == "mottle":
        return 0.5 + 0.5 * np.sin(7 * u + 3 * np.sin(5 * v)) * np.sin(8 * v + 2 * np.sin(6 * u))
    if name == "tape":
        return (np.abs(u) < 0.2) * 1.0
    if name == "waves":
        return 0.5 + 0.5 * np.sin(6 * v + np.sin(8 * u))
    return np.zeros(np.broadcast_shapes(u.shape, v.shape))


def place(sprite, first, canvas, scale, pad):
    """The frames of this canvas (f, h, w, 3) that show a sprite, and there, in pixels (n, 1, 1): x, y, half width and
    height with the corners, angle, alpha, and the half size of a patch that holds it."""

    def each(value, factor=1.0, shift=0.0):
        value = np.asarray(value, np.float32)
        value = value[first : first + len(canvas)] if value.ndim else np.full(len(canvas), value)
        return value * np.float32(factor) + np.float32(shift)

    x, y = each(sprite.x, scale, pad), each(sprite.y, scale, pad)
    wide, high = (each(value, scale, sprite.round * scale) for value in sprite.half)
    angle, alpha = each(sprite.angle), each(sprite.alpha)
    turns = np.any(angle) and np.any(np.asarray(sprite.half))
    across, down = (np.hypot(wide, high),) * 2 if turns else (wide, high)
    seen = (alpha > 0.01) & (np.abs(2 * x - canvas.shape[2]) < canvas.shape[2] + 2 * across + 2)
    seen = np.flatnonzero(seen & (np.abs(2 * y - canvas.shape[1]) < canvas.shape[1] + 2 * down + 2))
    return seen, [v[seen, None, None] for v in (x, y, wide, high, angle, alpha, across, down)]


def paint(sprite, canvas, first, scale, pad, cover=None):
    """Draws a sprite into canvas (f, h, w, 3) of frames `first`..., edges one pixel soft, all frames at once."""
    seen, (x, y, wide, high, angle, alpha, across, down) = place(sprite, first, canvas, scale, pad)
    if not len(seen):
        return
    left, top = np.floor(x - across.max() - 1), np.floor(y - down.max() - 1)
    dx = left + 0.5 - x + np.arange(math.ceil(2 * across.max()) + 4, dtype=np.float32)  # (n, 1, q)
    dy = (
        top + 0.5 - y + np.arange(math.ceil(2 * down.max()) + 4, dtype=np.float32)[:, None]
    )  # (n, p, 1)
    u, v = dx, dy  # the body's own axes
    if np.any(angle):
        u, v = (
            np.cos(angle) * dx + np.sin(angle) * dy,
            np.cos(angle) * dy - np.sin(angle) * dx,
        )  # (n, p, q)
    r, look = np.float32(sprite.round * scale), sprite.look
    out = np.hypot(
        np.maximum(np.abs(u) - (wide - r), 0), np.maximum(np.abs(v) - (high - r), 0)
    )  # (n, p, q)
    alpha = (np.clip(r + 0.5 - out, 0, 1) * alpha)[..., None]
    colour = np.float32(look.colour)
    if look.pattern != "plain":
        tile = np.float32(0.12 * scale)  # large things repeat their pattern
        mix = pattern(look.pattern, u / np.minimum(wide, tile), v / np.minimum(high, tile))
        colour = colour + mix[..., None] * (np.float32(look.second) - colour)
    if look.pattern != "plain" or look.shine:
        light = 1 - np.float32(0.2) * (
            dx / wide + dy / high
        )  # from above left, however the body is turned
        away = (dx / wide + np.float32(0.35)) ** 2 + (dy / high + np.float32(0.4)) ** 2
        spot = np.float32(look.shine) * np.exp(-10 * away)
        colour = colour * light[..., None] + spot[..., None]
    paint_colour = np.broadcast_to(colour, alpha.shape[:3] + (3,))
    for k, frame in enumerate(seen):
        x0, y0 = int(left[k, 0, 0]), int(top[k, 0, 0])
        here = np.s_[
            max(y0, 0) : max(y0 + alpha.shape[1], 0), max(x0, 0) : max(x0 + alpha.shape[2], 0)
        ]
        part = canvas[frame][here]
        there = np.s_[
            k, max(-y0, 0) : max(-y0, 0) + part.shape[0], max(-x0, 0) : max(-x0, 0) + part.shape[1]
        ]
        part += alpha[there] * (paint_colour[there] - part)
        if cover is not None:
            cover[frame][here] += alpha[there] * (1 - cover[frame][here])


def backdrop(rng, size):
    """A soft picture (size, size, 3) to stand behind everything: a gradient, checks, stripes or clouds."""
    kind, (a, b) = (
        rng.choice(["gradient", "checks", "stripes", "clouds"]),
        rng.uniform(0.15, 0.95, (2, 3)),
    )
    turn = rng.uniform(0, 2 * np.pi)
    b = b if kind in ("gradient", "clouds") else a + rng.uniform(0.1, 0.5) * (b - a)
    x, y = np.meshgrid(*[np.arange(size, dtype=np.float32) / size] * 2)
    u, v, cells = (
        x * np.cos(turn) + y * np.sin(turn),
        y * np.cos(turn) - x * np.sin(turn),
        rng.uniform(3, 9),
    )
    if kind == "gradient":
        mix = u - u.min()
    elif kind == "clouds":
        waves = rng.uniform(-14, 14, (12, 2))
        mix = 0.5 + sum(np.sin(x * p + y * q + turn * k) / 8 for k, (p, q) in enumerate(waves))
    else:
        wave = np.sin(np.pi * cells * u) * (np.sin(np.pi * cells * v) if kind == "checks" else 1)
        mix = np.clip(0.5 + 4 * wave, 0, 1)
    return np.float32(a) + mix[..., None].astype(np.float32) * np.float32(b - a)


def shaking(rng, times):
    """A hand-held camera's wander (f, 2) in picture widths, or none."""
    amount = rng.choice([0.0, 0.004, 0.012, 0.02], p=[0.45, 0.2, 0.2, 0.15])
    return amount * sum(
        np.sin(times[:, None] * rng.uniform(1, 14, 2) + rng.uniform(0, 7, 2)) / 3 for _ in range(3)
    )


def draw(world, rng, size):
    """The world's frames, uint8 (f, h, w, 3). The stage is a little larger than the picture: room for the camera."""
    total, pad = len(world.times), math.ceil(0.021 * size) + 1
    side, roam = size + 2 * pad, round(0.3 * size)
    back, other = backdrop(rng, side + roam), backdrop(rng, side + roam)
    drift = rng.uniform(-1, 1, 2) * roam * rng.choice([0, 1, 3], p=[0.5, 0.3, 0.2]) / world.duration
    origin, changes = rng.uniform(0, roam, 2), rng.random() < 0.25
    light = rng.uniform(0.65, 1.15) * (1 + rng.uniform(-0.08, 0.08, 3)) * 255
    flicker = rng.choice([0.0, 0.03, 0.1], p=[0.6, 0.25, 0.15])
    flicker = 1 + flicker * np.sin(world.times * rng.uniform(1, 25) + rng.uniform(0, 7))
    shake, start = shaking(rng, world.times) * size + pad, rng.uniform(0, world.duration)
    over, cover = np.zeros((1, side, side, 3), np.float32), np.zeros((1, side, side, 1), np.float32)
    for sprite in world.scenery:
        paint(sprite, over, 0, size, pad, cover)
    frames, stretch = (
        np.empty((total, size, size, 3), np.uint8),
        16,
    )  # so many at a time stay in the cache
    for first in range(0, total, stretch):
        count = min(stretch, total - first)
        canvas = np.empty((count, side, side, 3), np.float32)
        for k, time in enumerate(world.times[first : first + count]):
            x, y = (np.abs((origin + drift * time + roam) % (2 * roam) - roam)).astype(
                int
            )  # to and fro
            canvas[k] = back[y : y + side, x : x + side]
            if changes:
                mix = np.float32(np.clip((time - start) / 1.5, 0, 1))
                canvas[k] += mix * (other[y : y + side, x : x + side] - canvas[k])
        canvas *= 1 - cover
        canvas += over
        for sprite in world.sprites:
            paint(sprite, canvas, first, size, pad)
        for k in range(count):
            (x, y), (a, b) = shake[first + k].astype(int), np.float32(shake[first + k] % 1)
            view = canvas[k, y : y + size + 1, x : x + size + 1]
            if a or b:
                view = view[:, :-1] + a * (view[:, 1:] - view[:, :-1])
                view = view[:-1] + b * (view[1:] - view[:-1])
            gain = np.float32(light * flicker[first + k])
            frames[first + k] = np.clip(view[:size, :size] * gain, 0, 255)
    return frames


# ---------------------------------------------------------------------------------------------------------------- sound


def ring(thing, strength, rng):
    """The resonances and contact noise of one struck thing, peak 1. A harder hit is brighter."""
    m = MATERIALS[thing.material]
    pitch = m.pitch * (0.08 / thing.size) ** 0.7
    length = round(SAMPLE_RATE * min(max(m.decay, 8 * m.hiss_decay), 2.5))
    time = np.arange(length, dtype=np.float32) / SAMPLE_RATE
    wave = np.zeros(length, np.float32)
    for ratio, detune in zip(m.ratios, thing.detune):
        f, decay = pitch * ratio * detune, m.decay / ratio**0.5
        weight = ratio ** -(m.tilt + 0.8 * (1 - strength)) * rng.uniform(0.7, 1.3)
        if f < 0.47 * SAMPLE_RATE:
            s = time[: round(decay * SAMPLE_RATE)]
            turns = f * s
            if thing.material == "water":
                turns = turns * (1 + 0.6 * np.minimum(s / 0.06, 1.5))  # a bubble's note rises
            wave[: len(s)] += (
                weight * np.sin(2 * np.pi * turns, dtype=np.float32) * np.exp(-6.9 / decay * s)
            )
    wave /= max(np.abs(wave).max(), 1e-6)
    s = time[: round(7 * m.hiss_decay * SAMPLE_RATE)]
    spectrum = np.fft.rfft(rng.standard_normal(len(s)))
    octaves = np.log2(
        np.fft.rfftfreq(len(s), 1 / SAMPLE_RATE)[1:] / (m.hiss_pitch * (0.5 + 0.6 * strength))
    )
    spectrum[1:] *= np.exp(-(octaves**2))
    noise = np.fft.irfft(spectrum, len(s)) * np.exp(-s / m.hiss_decay)
    wave[: len(s)] += m.hiss * noise / np.abs(noise).max()
    wave[:8] *= np.arange(8) / 8  # half a millisecond of attack: no click of its own
    return wave / np.abs(wave).max()


def rubbing(rub, rng):
    """Noise through the material's colour, as loud as the movement is fast; a rolling thing also thumps once a turn."""
    m, length = MATERIALS[rub.thing.material], round(len(rub.speed) / FINE * SAMPLE_RATE)
    speed = np.interp(np.arange(length) / SAMPLE_RATE, np.arange(len(rub.speed)) / FINE, rub.speed)
    f = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)[1:]
    centre = (
        0.5 * m.pitch**0.5 * 12 if rub.kind == "roll" else 1.2 * (m.pitch * m.hiss_pitch) ** 0.5
    )
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[1:] *= np.exp(-((np.log2(f / centre) / (0.8 if rub.kind == "roll" else 1.1)) ** 2))
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, length)
    turn = np.cumsum(speed) / SAMPLE_RATE / rub.thing.size
    wobble = 1 + 0.4 * np.sin(turn) if rub.kind == "roll" else 1.0
    edge = np.minimum(
        np.minimum(np.arange(length), np.arange(length)[::-1]) / (0.03 * SAMPLE_RATE), 1
    )
    return (
        0.03 * noise / max(noise.std(), 1e-9) * np.minimum(speed / 0.8, 1.2) * wobble * edge
    ).astype(np.float32)


def sound(world, rng, samples):
    """Every audible impact at its sample, the rubbing, a small room and its quiet tone: float32 (n,), peak below 1."""
    dry = np.zeros(samples + 3 * SAMPLE_RATE, np.float32)
    for hit in world.audible():
        first, other = ring(hit.thing, hit.strength, rng), ring(hit.other, hit.strength, rng)
        start = round(hit.time * SAMPLE_RATE)
        dry[start : start + len(first)] += 0.5 * hit.strength * first
        dry[start : start + len(other)] += 0.15 * hit.strength * other
    for rub in world.rubs:
        wave, start = rubbing(rub, rng), round(rub.start * SAMPLE_RATE)
        dry[start : start + len(wave)] += wave
    room = rng.uniform(0.08, 0.35)  # seconds until the echo has fallen by 60 dB
    tail = rng.standard_normal(round(room * SAMPLE_RATE)) * np.exp(
        -6.9 * np.linspace(0, 1, round(room * SAMPLE_RATE))
    )
    tail *= rng.uniform(0.1, 0.35) / np.sqrt(np.sum(tail**2))
    tail[0] += 1.0
    size = 1 << (samples + len(tail)).bit_length()
    wet = np.fft.irfft(np.fft.rfft(dry[:samples], size) * np.fft.rfft(tail, size), size)[:samples]
    wet += 10 ** (rng.uniform(-68, -58) / 20) * rng.standard_normal(samples)
    return (wet * min(1.0, 0.95 / np.abs(wet).max())).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ clips and files


class Clip(NamedTuple):
    frames: np.ndarray  # uint8 (f, h, w, 3)
    wav: np.ndarray  # float32 (n,), as long as the picture
    labels: dict


def make_clip(seed, index, size=96, fps=15.625, duration=8.192, materials="usual"):
    """Clip `index` of set `seed`, of things made of `SOLIDS[materials]`. World, picture and sound draw from streams of their own."""
    world_rng, draw_rng, sound_rng = (np.random.default_rng([seed, index, k]) for k in range(3))
    total = max(1, round(duration * fps))
    world = make_world(world_rng, np.arange(total) / fps, total / fps, SOLIDS[materials])
    onsets = [
        {
            "time": round(float(h.time), 5),
            "material": h.thing.material,
            "strength": round(float(h.strength), 4),
            "kind": h.kind,
            "other": h.other.material,
        }
        for h in world.audible()
    ]
    sustained = [
        {
            "start": round(float(r.start), 5),
            "end": round(float(r.start) + len(r.speed) / FINE, 5),
            "kind": r.kind,
            "material": r.thing.material,
            "strength": round(float(min(r.speed.max() / 0.8, 1.2)), 4),
        }
        for r in world.rubs
    ]
    labels = {
        "onsets": onsets,
        "sustained": sustained,
        "seed": seed,
        "index": index,
        "duration": total / fps,
        "fps": fps,
        "size": size,
        "materials": materials,
        "floor": world.ground.material,
    }
    return Clip(
        draw(world, draw_rng, size),
        sound(world, sound_rng, round(total / fps * SAMPLE_RATE)),
        labels,
    )


def write_clip(clip, path):
    """H.264 (yuv420p) and AAC, both from time zero, one thread each so that the same clip gives the same bytes."""
    rate = Fraction(clip.labels["fps"]).limit_denominator(1000)
    size = clip.labels["size"]
    with atomic_write(path) as part, av.open(str(part), "w", format="mp4") as out:
        video = out.add_stream(
            "libx264", rate=rate, options={"preset": "ultrafast", "crf": "20", "threads": "1"}
        )
        video.width = video.height = size
        video.pix_fmt, video.time_base = "yuv420p", 1 / rate
        audio = out.add_stream(
            "aac", rate=SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"}
        )
        audio.bit_rate = 64000
        for i, picture in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for start in range(0, len(clip.wav), 1024):
            frame = av.AudioFrame.from_ndarray(
                clip.wav[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = (
                SAMPLE_RATE,
                start,
                Fraction(1, SAMPLE_RATE),
            )
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))


def set_up(event):
    """A worker ignores Ctrl-C and finishes the clip in hand; the parent's event tells it to begin no other."""
    global stop
    stop = event
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_file(job):
    """One clip and its label; the video is written last and whole, so that its presence means that both are there."""
    out, index, kind = job
    path = Path(out) / f"{index:05d}.mp4"
    if stop.is_set():
        return
    clip = make_clip(index=index, **kind)
    with atomic_write(path.with_suffix(".json")) as part:
        Path(part).write_text(json.dumps(clip.labels) + "\n")
    write_clip(clip, path)


def standing(out, indices, kind):
    """The indices still to make. A clip of another seed or kind under the same name is an error, not one to keep."""
    missing = []
    for index in indices:
        path = Path(out) / f"{index:05d}.mp4"
        if not path.exists():
            missing.append(index)
            continue
        try:
            labels = json.loads(path.with_suffix(".json").read_text())
            same = (
                all(labels[key] == kind[key] for key in ("seed", "size", "fps"))
                and labels["index"] == index
            )
            same = same and labels.get("materials", "usual") == kind.get("materials", "usual")
            same = same and round(kind["duration"] * kind["fps"]) == round(
                labels["duration"] * kind["fps"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise MediaError(
                f"{path}: not a clip of this set (seed, size, fps, duration or materials differ); give another OUT"
            )
    return missing


def make_set(out, clips, workers=1, start=0, **kind):
    """Writes clips start ... start + clips - 1 into `out`; gives how many stand. Ctrl-C finishes those in hand."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"{out}: cannot be made ({error.strerror}); give another OUT") from error
    missing = standing(out, range(start, start + clips), kind)
    context = multiprocessing.get_context("spawn" if sys.platform != "linux" else "fork")
    stop = context.Event()
    bar = tqdm(total=clips, initial=clips - len(missing), unit="clip", smoothing=0.05)
    with context.Pool(workers, set_up, (stop,)) as pool, bar:
        try:
            for _ in pool.imap_unordered(make_file, [(out, index, kind) for index in missing]):
                bar.update()
        except KeyboardInterrupt:
            pass
        finally:  # whatever happened, let the workers finish what they write
            stop.set()
            pool.close()
            pool.join()
    return clips - len(standing(out, range(start, start + clips), kind))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the procedural Foley set.")
    parser.add_argument(
        "out", metavar="OUT", help="folder for 00000.mp4, 00000.json, ...; clips there are kept"
    )
    parser.add_argument("--clips", type=int, default=1000, metavar="N", help="how many (1000)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="which set; its clip i is always the same (0)",
    )
    parser.add_argument(
        "--start", type=int, default=0, metavar="I", help="number of the first clip (0)"
    )
    parser.add_argument(
        "--size", type=int, default=96, help="width and height in pixels, even (96)"
    )
    parser.add_argument("--fps", type=float, default=15.625, help="frames a second (15.625)")
    parser.add_argument("--duration", type=float, default=8.192, help="seconds (8.192)")
    parser.add_argument(
        "--materials",
        choices=list(SOLIDS),
        default="usual",
        help="what things are made of; other: four materials "
        "that the usual set has not, to fine-tune on (usual)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    args = parser.parse_args(argv)
    for flag, fine, need in (
        ("--clips", args.clips > 0, "1 or more"),
        ("--seed", args.seed >= 0, "0 or more"),
        ("--start", args.start >= 0, "0 or more"),
        ("--workers", args.workers > 0, "1 or more"),
        ("--size", args.size in range(32, 2049, 2), "an even number from 32 to 2048"),
        ("--fps", 4 <= args.fps <= 120, "4 to 120"),
        ("--duration", 2 <= args.duration <= 120, "2 to 120"),
    ):
        if not fine:
            parser.error(f"{flag}: must be {need}")
    try:
        made = make_set(
            args.out,
            args.clips,
            args.workers,
            args.start,
            seed=args.seed,
            size=args.size,
            fps=args.fps,
            duration=args.duration,
            materials=args.materials,
        )
    except MediaError as error:
        print(f"foley.py: {error}", file=sys.stderr)
        return 1
    if made < args.clips:
        print(
            f"foley.py: stopped at {made} of {args.clips} clips; the same command makes the rest",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
