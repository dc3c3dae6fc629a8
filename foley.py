"""The procedural Foley set: short videos of a small world whose sound follows from what happens.

in   a seed and a clip number; clip i of seed S is a pure function of (S, i, size, fps, duration,
     materials, rates)
out  OUT/00000.mp4, H.264 and AAC mono 16 kHz, both starting at 0 and equally long, and
     OUT/00000.json: {"onsets": [{"time", "material", "strength", "kind", "other"}, ...],
     "sustained": [{"start", "end", "kind", "material", "strength"}, ...], "seed", "index", ...}.
     An onset's time is the instant of first contact in seconds, its strength the loudness of
     the hit, 0 to 1

    python foley.py OUT --clips 1000 --seed 0
    python foley.py OUT --clips 1000 --seed 20 --rates real --fps 25      hits as close as in films

The paper trains on VGGSound (section 4.1); this set stands in for it where true onset times are
needed. A world consists of sprites (what is rendered, one position per frame) and of impacts and
rubs (what sounds and is labeled), all computed from the same trajectories, so that picture, sound
and label cannot disagree. Sound is modal synthesis: a material has resonances, damping and contact
noise; size lowers the pitch, impact speed sets loudness and brightness, both bodies ring.

Lengths are in picture widths, y points down, times are in seconds, speeds in picture widths a
second. `rng` is a np.random.Generator. The shipped weights' training set is defined by this file:
whoever changes the order of the random draws, or of an operation on floats, changes that set.
"""

import itertools
import json
import math
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from common import cli
from common.ffmpeg import SAMPLE_RATE
from common.files import UserError, atomic_write, make_folder, write_bytes

FINE = 1000  # positions and speeds a second, where a trajectory has no closed form
FAINTEST = 0.07  # impacts weaker than this (-23 dB) neither sound nor are labeled
SIDES = (-1, 1)  # left and right
LOUDEST_SPEED = 2.0  # an impact at this speed or more has strength 1
# of real rates, in seconds: what lies between two hits
SHORTEST_GAP = 0.12
LONGEST_GAP = 1.3
MOST_HITS = {"usual": 1.5, "real": 8}  # a second, on average over a clip


# ---- materials ---------------------------------------------------------------------------------


class Look(NamedTuple):
    """How a body looks."""

    color: np.ndarray  # RGB in [0, 1]
    second: np.ndarray  # the pattern's other color
    pattern: str  # a case of `pattern`, or "plain"
    shine: float  # highlight, 0 to 1


class Material(NamedTuple):
    """How a body bounces and sounds."""

    bounce: float  # restitution
    pitch: float  # lowest resonance in Hz of a body of half-size 0.08
    decay: float  # seconds until the lowest resonance has fallen by 60 dB
    tilt: float  # how fast higher resonances weaken
    hiss: float  # contact noise relative to the resonances
    hiss_pitch: float  # its center in Hz
    hiss_decay: float  # its time constant in seconds
    ratios: list  # resonances relative to the lowest


LOOK_TABLE = """
material   color           second          pattern  shine
wood       0.64 0.42 0.22  0.42 0.25 0.12  grain    0.15
metal      0.74 0.77 0.82  0.50 0.54 0.62  brushed  0.9
brass      0.90 0.68 0.20  0.66 0.44 0.08  rings    0.8
glass      0.80 0.95 0.97  0.30 0.62 0.74  rim      1
ceramic    0.96 0.95 0.90  0.16 0.30 0.75  band     0.7
rubber     0.78 0.14 0.16  0.50 0.06 0.10  dots     0.1
plastic    0.25 0.80 0.32  0.95 0.95 0.30  halves   0.45
stone      0.46 0.45 0.44  0.26 0.25 0.27  mottle   0
cardboard  0.78 0.60 0.38  0.90 0.84 0.68  tape     0
water      0.16 0.42 0.70  0.30 0.60 0.85  waves    0.3
bell       0.50 0.33 0.12  0.28 0.36 0.26  rings    0.7
ice        0.86 0.93 1.00  0.60 0.76 0.95  mottle   0.8
drum       0.93 0.86 0.72  0.45 0.08 0.10  band     0.1
bamboo     0.80 0.74 0.34  0.47 0.44 0.16  halves   0.3
"""
MATERIAL_TABLE = """
material   bounce  pitch  decay  tilt  hiss  hiss_pitch  hiss_decay  ratios
wood       0.55    380    0.22   0.7   0.5   900         0.010       1 2.6 4.3 6.1
metal      0.60    950    1.3    0.4   0.2   4000        0.004       1 2.76 5.4 8.9
brass      0.50    480    2.2    0.3   0.1   3000        0.004       1 1.5 2 2.74 3.76
glass      0.50    2100   0.7    0.3   0.15  5500        0.003       1 1.6 2.32 3.3
ceramic    0.45    1250   0.28   0.4   0.35  3500        0.005       1 1.83 2.9 4.2
rubber     0.80    115    0.22   1.3   0.2   250         0.020       1 1.6 2.3
plastic    0.68    640    0.10   0.7   0.4   1800        0.006       1 1.7 2.4 3.9
stone      0.40    2500   0.06   0.3   1.0   2800        0.012       1 1.41 1.93 2.6
cardboard  0.25    170    0.14   1.0   1.6   520         0.030       1 1.9 2.7
water      0.00    700    0.18   0.0   0.12  2500        0.008       1
bell       0.45    720    3.0    0.25  0.05  4500        0.003       1 1.2 1.5 2 2.67 4
ice        0.35    3300   0.10   0.5   0.9   5800        0.008       1 1.87 2.71 3.5
drum       0.70    140    0.50   0.8   0.3   700         0.010       1 1.59 2.14 2.3 2.65 2.92
bamboo     0.55    620    0.09   0.6   0.8   1500        0.008       1 2.32 3.9 5.2
"""


def read_table(table: str, make) -> dict:
    """name -> make(*words) of the rows below a table's head."""
    rows = [line.split() for line in table.strip().splitlines()[1:]]
    return {name: make(*words) for name, *words in rows}


def make_look(*words) -> Look:
    """A row of LOOK_TABLE."""
    *colors, kind, shine = words
    colors = np.array(colors, float)
    return Look(colors[:3], colors[3:], kind, float(shine))


def make_material(*words) -> Material:
    """A row of MATERIAL_TABLE."""
    numbers = [float(word) for word in words]
    return Material(*numbers[:7], numbers[7:])


LOOKS = read_table(LOOK_TABLE, make_look)
MATERIALS = read_table(MATERIAL_TABLE, make_material)
# set "other": unseen and unheard by a model trained on the usual set
OTHER = ("bell", "ice", "drum", "bamboo")
SOLIDS = {
    "usual": tuple(name for name in MATERIALS if name not in ("water", *OTHER)),
    "other": OTHER,
}
FLOORS = ("wood", "stone", "ceramic", "metal", "rubber")


class Thing(NamedTuple):
    """A sounding body: its material, its half-size, and its detuning, which all its hits share."""

    material: str
    size: float
    detune: tuple  # a factor near 1 for each of the material's resonances

    @classmethod
    def make(cls, rng, material: str, size: float):
        """A thing whose resonances are out of tune by 1.5 % or so."""
        detune = 1 + 0.015 * rng.standard_normal(len(MATERIALS[material].ratios))
        return cls(str(material), size, tuple(detune))


# ---- what a world consists of ------------------------------------------------------------------


class Impact(NamedTuple):
    """Two things hit each other."""

    time: float
    x: float  # where; -1 if above the picture, since what nobody sees is left out
    speed: float  # closing speed
    kind: str  # bounce, wall, collision, hammer, drip
    thing: Thing  # what rings, and gives the label's material
    other: Thing  # what also rings, more softly

    @property
    def strength(self):
        """Loudness, 0 to 1."""
        return min(1.0, (self.speed / LOUDEST_SPEED) ** 1.3)


class Rub(NamedTuple):
    """Rolling or scraping: sounds while it moves, as loud as it is fast."""

    start: float
    speed: np.ndarray  # FINE values a second
    kind: str  # roll, scrape
    thing: Thing


@dataclass
class Sprite:
    """A rounded box (a disc if it has no straight sides). Every number may be one per frame."""

    look: Look
    x: np.ndarray
    y: np.ndarray
    half: tuple  # straight part, half width and half height
    corner: float  # radius
    angle: np.ndarray = 0.0  # radians, clockwise
    alpha: np.ndarray = 1.0


@dataclass
class World:
    """What happens in one clip."""

    floor: float  # height of the floor's edge
    ground: Thing  # the floor itself
    times: np.ndarray  # of the frames (f,)
    duration: float
    solids: tuple = SOLIDS["usual"]  # what things are made of
    rates: str = "usual"  # how close hits follow each other
    scenery: list = field(default_factory=list)  # sprites that never move
    sprites: list = field(default_factory=list)  # sprites that may, rendered in this order
    impacts: list = field(default_factory=list)
    rubs: list = field(default_factory=list)
    lanes: int = 0  # acts side by side
    tangled: bool = False  # bodies leaning on each other without end: a world to throw away

    @property
    def fine_times(self):
        """FINE instants a second, for trajectories without a closed form."""
        return np.arange(round(self.duration * FINE)) / FINE

    def audible(self) -> list:
        """The impacts that sound and are labeled: seen, not faint, not masked by a louder one."""
        kept = []
        for hit in sorted(self.impacts):
            # the margins keep the contact in view and its sound inside the clip
            in_view = 0.02 < hit.x < 0.98
            in_time = 0.05 < hit.time < self.duration - 0.1
            if not in_view or not in_time or hit.strength < FAINTEST:
                continue
            # 8 dB below another within 60 ms: nobody hears it apart
            masked = any(
                hit.time - before.time < 0.06 and hit.strength < 0.4 * before.strength
                for before in kept[-4:]
            )
            if not masked:
                kept.append(hit)
        return kept


def jitter(rng, material: str) -> Look:
    """The material's look with its colors a little off, as two wooden things differ."""
    look = LOOKS[material]
    shift = 0.03 * rng.standard_normal(3) + 0.05 * rng.standard_normal()
    return look._replace(
        color=np.clip(look.color + shift, 0, 1), second=np.clip(look.second + shift, 0, 1)
    )


def plain(color, shine: float = 0.0) -> Look:
    """A look of one color: RGB in [0, 1], or one number for a gray."""
    return Look(color, color, "plain", shine)


def thread(x, y, alpha=1.0) -> Sprite:
    """A line from the top of the picture down to y."""
    half = (0.002, np.maximum(y / 2, 0.01))
    return Sprite(plain(0.2), x, y / 2, half, 0.004, 0.0, alpha)


def body_sprite(look, ball: bool, size: float, x, y, angle=0.0, alpha=1.0) -> Sprite:
    """A ball of radius `size`, or a box with rounded corners of that half-size."""
    straight = 0.0 if ball else 0.8 * size
    return Sprite(look, x, y, (straight, straight), size - straight, angle, alpha)


def add_with_shadow(world, look, ball: bool, size: float, x, y):
    """Adds a body on the track x, y (f,) and its shadow. A ball turns as it rolls."""
    # darkens the floor's edge under the body, the more the nearer it is: a cue to contact
    near = np.clip(1 - (world.floor - y - size) / 0.3, 0, 1)
    alpha = 0.55 * near * (y < world.floor)
    edge = world.floor + 0.008
    world.sprites.append(Sprite(plain(0.0), x, edge, (0.8 * size, 0.0), 0.008, alpha=alpha))
    angle = (x - x[0]) / size if ball else 0.0
    world.sprites.append(body_sprite(look, ball, size, x, y, angle))


# ---- bodies in flight --------------------------------------------------------------------------


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
        """Position and velocity x, y, vx, vy at a time or times."""
        s = time - self.time
        return (
            self.x + self.vx * s + self.ax * s * s / 2,
            self.y + self.vy * s + self.ay * s * s / 2,
            self.vx + self.ax * s,
            self.vy + self.ay * s,
        )


@dataclass
class Body:
    """A moving thing and its trajectory."""

    thing: Thing
    ball: bool
    pieces: list  # Piece, in time order
    release: float = math.inf  # when it is let go, if it is held
    throw: tuple = (0.0, 0.0)  # the velocity it then gets
    look: Look = None

    def move_on(self, time, x, y, vx, vy, gravity, rests=False):
        """Appends the piece after a contact. One that rests on the floor brakes to a stop."""
        self.release = math.inf
        brake = 0.0
        if rests:
            brake = 0.18 if self.ball else 0.9  # of rolling, of sliding
            vy = 0.0
            gravity = 0.0
        self.pieces.append(Piece(time, x, y, vx, vy, -brake * np.sign(vx), gravity))

    def track(self, times):
        """Positions and velocities (4, f) at all `times`."""
        starts = np.array([piece.time for piece in self.pieces])
        current = np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)
        rows = np.array(self.pieces)[current]  # (f, 7)
        return np.stack(Piece(*rows.T).at(times))


def first_root(a: float, b: float, c: float) -> float:
    """The smallest s > 0 at which a s^2 + b s + c falls to zero from above, else infinity."""
    if abs(a) < 1e-12:
        s = -c / b if b < 0 else math.inf
        return s if s > 1e-9 else math.inf
    discriminant = b * b - 4 * a * c
    if discriminant < 0:
        return math.inf
    roots = [(-b + sign * math.sqrt(discriminant)) / (2 * a) for sign in (-1, 1)]
    return min((s for s in roots if s > 1e-7 and 2 * a * s + b < 0), default=math.inf)


def next_contact(body, box: tuple):
    """When and how the body's last piece ends within a box (left, right, floor): (time, what)."""
    if body.release < math.inf:
        return body.release, "release"
    piece = body.pieces[-1]
    radius = body.thing.size
    left, right, floor = box
    options = [
        (first_root(piece.ax / 2, piece.vx, piece.x - radius - left), "left"),
        (first_root(-piece.ax / 2, -piece.vx, right - radius - piece.x), "right"),
    ]
    if piece.ay:
        fall = first_root(-piece.ay / 2, -piece.vy, floor - radius - piece.y)
        options.append((fall, "floor"))
    if piece.ax:
        options.append((-piece.vx / piece.ax, "stop"))
    wait, what = min(options)
    return piece.time + wait, what


def next_meeting(a, b, until: float) -> float:
    """When two bodies touch before `until`: their gap is sampled every 4 ms, then interpolated."""
    start = max(a.pieces[-1].time, b.pieces[-1].time, 0.0)
    times = np.arange(start + 1e-4, until + 0.004, 0.004)
    if len(times) < 2:
        return math.inf
    xa, ya, *_ = a.pieces[-1].at(times)
    xb, yb, *_ = b.pieces[-1].at(times)
    gap = np.hypot(xa - xb, ya - yb) - a.thing.size - b.thing.size
    hits = np.flatnonzero((gap[1:] <= 0) & (gap[1:] < gap[:-1]))
    if not len(hits):
        return math.inf
    k = hits[0]
    return float(times[k] + 0.004 * max(gap[k], 0) / max(gap[k] - gap[k + 1], 1e-9))


def next_event(bodies, world, box: tuple):
    """What happens first: (time, what, body, the other body if two meet)."""
    contacts = ((*next_contact(body, box), i) for i, body in enumerate(bodies))
    time, what, index = min(contacts)
    body = bodies[index]
    other = None
    for b, a in itertools.combinations(bodies, 2):
        meeting = next_meeting(a, b, min(time, world.duration))
        if meeting < time:
            time = meeting
            what = "meet"
            body = a
            other = b
    return time, what, body, other


def collide(a, b, time: float, gravity, floor: float):
    """Two balls exchange momentum along the line of centers (mass as area): (x, closing speed)."""
    states = np.array([body.pieces[-1].at(time) for body in (a, b)])  # x, y, vx, vy of each
    positions = states[:, :2]
    velocities = states[:, 2:]
    gap = positions[1] - positions[0]
    normal = gap / max(math.hypot(*gap), 1e-9)
    closing = max(((velocities[0] - velocities[1]) * normal).sum(), 0.0)
    bounce = math.sqrt(MATERIALS[a.thing.material].bounce * MATERIALS[b.thing.material].bounce)

    # velocity per impulse of each body, and both together along the normal
    sides = []
    compliance = 0.0
    for body, y, push in zip((a, b), positions[:, 1], (-normal, normal), strict=True):
        mass = body.thing.size**2
        grounded = body.pieces[-1].ay == 0 and y > floor - body.thing.size - 1e-3
        if grounded and push[1] > 0:
            push = push * (1, 0)  # the floor takes what presses down on it
        sides.append((grounded, push / mass))
        compliance += push @ push / mass

    # a little push (0.05) keeps bodies from leaning on each other
    impulse = (closing * (1 + bounce) + 0.05) / max(compliance, 1e-9)
    for body, (x, y), velocity, (grounded, kick) in zip(
        (a, b), positions, velocities, sides, strict=True
    ):
        vx, vy = velocity + impulse * kick
        if grounded:
            y = floor - body.thing.size
        body.move_on(time, x, y, vx, vy, gravity, grounded and vy > -0.2)
    x, y = positions.mean(0)
    return x if y > 0 else -1.0, closing


def simulate(bodies, world, gravity, left, right, post):
    """Moves the bodies from contact to contact until the clip ends.

    Walls of `post` stand at `left` and `right`. The world gets all impacts and rubs; bodies that
    are not done after 300 contacts make it `tangled`.
    """
    for _ in range(300):
        time, what, body, other = next_event(bodies, world, (left, right, world.floor))
        if time > world.duration:
            break
        x, y, vx, vy = body.pieces[-1].at(time)
        bounce = MATERIALS[body.thing.material].bounce
        match what:
            case "meet":
                x, speed = collide(body, other, time, gravity, world.floor)
                hit = Impact(time, x, speed, "collision", body.thing, other.thing)
                world.impacts.append(hit)
            case "floor":
                world.impacts.append(Impact(time, x, vy, "bounce", body.thing, world.ground))
                # it stays down where the next hop would be too short to see
                rests = 2 * bounce * vy / gravity < 0.16
                y = world.floor - body.thing.size
                friction = 0.9 if body.ball else 0.6
                body.move_on(time, x, y, vx * friction, -bounce * vy, gravity, rests)
            case "release":
                body.move_on(time, x, y, *body.throw, gravity)
            case "stop":
                body.pieces.append(Piece(time, x, y, 0.0, 0.0, 0.0, 0.0))
            case "left" | "right":
                x_seen = x if y > 0 else -1.0
                world.impacts.append(Impact(time, x_seen, abs(vx), "wall", body.thing, post))
                grounded = body.pieces[-1].ay == 0
                body.move_on(time, x, y, -bounce * vx, vy, gravity, grounded)
    else:
        world.tangled = True
    for body in bodies:
        add_rubs(world, body)


def add_rubs(world, body):
    """Adds the sound of every piece of a trajectory on which friction brakes the body."""
    ends = [piece.time for piece in body.pieces[1:]] + [math.inf]
    for piece, end in zip(body.pieces, ends, strict=True):
        end = min(end, world.duration)
        # shorter or slower ones are inaudible
        if piece.ax and end - piece.time > 0.05:
            speed = np.abs(piece.at(np.arange(piece.time, end, 1 / FINE))[2])
            if speed.max() > 0.08:
                kind = "roll" if body.ball else "scrape"
                world.rubs.append(Rub(piece.time, speed, kind, body.thing))


# ---- acts: each fills one lane of the stage, from `left` to `right` ----------------------------


def add_posts(world, rng, left, right, height: float) -> Thing:
    """Adds a wall at each side of the lane, standing on the floor."""
    material = rng.choice(["wood", "stone", "metal", "plastic"])
    half = height / 2
    for x in (left, right):
        look = jitter(rng, material)
        world.scenery.append(Sprite(look, x, world.floor - half, (0.008, half), 0.012))
    return Thing.make(rng, material, 0.12)


def act_bodies(world, rng, left, right):
    """One to three balls, or one box, let go or thrown in: they fall, bounce, collide, rest."""
    width = right - left
    ball = rng.random() < 0.75
    count = 1
    if ball and width > 0.4:
        count = int(rng.choice([1, 2, 3], p=[0.35, 0.5, 0.15]))

    # without posts, what leaves the lane leaves the picture
    post = world.ground
    bounds = (-9.0, 9.0)
    if count > 1 or rng.random() < 0.85:
        post = add_posts(world, rng, left, right, world.floor)
        bounds = (left + 0.02, right - 0.02)

    gravity = rng.uniform(1.5, 4.5)
    aimed = count > 1 and rng.random() < 0.7  # the first ball lies there, the others aim at it
    unfit = ("cardboard",) if ball else ("rubber", "glass")
    fit = [name for name in world.solids if name not in unfit]
    bodies = []
    for slot in rng.permutation(count):
        # bodies share the lane evenly; 0.42 of a share keeps neighbors apart, or nearly so
        size = min(rng.uniform(0.05, 0.11), 0.42 * width / count)
        x = left + 0.02 + (width - 0.04) * (slot + rng.uniform(0.4, 0.6)) / count
        thing = Thing.make(rng, rng.choice(fit), size)
        release = rng.uniform(0.2, 0.62 * world.duration)
        look = jitter(rng, thing.material)
        hung = rng.random() < 0.45
        # thrown in from above the picture, unless it lies on the floor or hangs on a thread
        y = -size - 0.02
        throw = (rng.uniform(-0.7, 0.7), rng.uniform(0, 0.8))
        if aimed and not bodies:
            y = world.floor - size
            release = math.inf
        elif hung:
            y = rng.uniform(size + 0.06, world.floor - size - 0.15)
            throw = (0.0, 0.0)
        elif aimed:
            # the speed that covers the distance to the target in the time of the fall, roughly
            distance = bodies[0].pieces[0].x - x
            vx = distance * rng.uniform(0.6, 1.2) * math.sqrt(gravity / 2 / world.floor)
            throw = (vx, 0.0)
        piece = Piece(-1.0, x, y, 0, 0, 0, 0)
        bodies.append(Body(thing, ball, [piece], release, throw, look))
    simulate(bodies, world, gravity, *bounds, post)

    for body in bodies:
        size = body.thing.size
        start = body.pieces[0]
        # the thread of one that hangs shows until it falls
        if 0 < start.y < world.floor - size:
            loose = body.pieces[1].time if body.pieces[1:] else world.duration
            world.sprites.append(thread(start.x, start.y - size, world.times < loose))
        x, y, _, _ = body.track(world.times)
        add_with_shadow(world, body.look, ball, size, x, y)


def rhythm(world, rng, shortest: float) -> list:
    """Irregular instants, or a beat with a little play, at least `shortest` apart.

    At real rates see `real_rhythm`.
    """
    if world.rates == "real":
        return real_rhythm(rng, world.duration, max(SHORTEST_GAP, shortest / 2.7))
    now = rng.uniform(0.6, 2.5)
    beat = 0.0
    if rng.random() < 0.3:
        beat = rng.uniform(shortest + 0.1, 1.3)
    times = []
    while now < world.duration - 0.3:
        times.append(now)
        step = beat * rng.uniform(0.93, 1.07) if beat else shortest + rng.exponential(0.9)
        now += max(shortest, step)
        # now and then a longer rest
        if rng.random() < 0.1:
            now += rng.uniform(0.5, 2.5)
    return times


def real_rhythm(rng, duration: float, shortest: float) -> list:
    """Instants as in recorded films of impacts: half of their gaps are below 0.3 s.

    The gap is log-uniform from `shortest` to LONGEST_GAP for a clip, and plays around that more or
    less; now and then there is a burst or a rest.
    """
    usual = math.exp(rng.uniform(math.log(shortest), math.log(LONGEST_GAP)))
    play = rng.choice([0.03, 0.15, 0.5])  # standard deviation of a gap's logarithm
    now = rng.uniform(0.2, 1.2)
    burst = 0  # hits that are left of it
    times = []
    while now < duration - 0.2:
        times.append(now)
        gap = usual * math.exp(play * rng.standard_normal())
        if not burst and rng.random() < 0.06:
            burst = int(rng.integers(2, 7))
            quick = rng.uniform(shortest, 1.8 * shortest)
        if burst:
            burst -= 1
            gap = quick * rng.uniform(0.9, 1.1)
        elif rng.random() < 0.05:
            gap += rng.uniform(0.5, 2.0)
        now += max(shortest, gap)
    return times


def progress(times, start: float, length: float):
    """0 before `start`, rising evenly to 1 within `length`."""
    return np.clip((times - start) / length, 0, 1)


def lerp(a, b, u):
    """From a to b as u goes from 0 to 1."""
    return a + u * (b - a)


def ease(u):
    """From 0 to 1 with a soft start and end."""
    return (1 - np.cos(np.pi * u)) / 2


def ease_out(u):
    """From 0 to 1 with a soft end."""
    return 1 - (1 - u) ** 2


def swing_mallet(world, rng, middle: float, arm: float, plate, head):
    """The mallet's angle over the plate at `world.times`; the world gets the impacts."""
    rest = rng.uniform(0.35, 0.6)
    times = world.fine_times
    angle = np.full(len(times), rest)  # 0 is on the plate, positive above it
    last = 0.0
    strokes = rhythm(world, rng, 0.32)
    for time, following in itertools.pairwise([*strokes, world.duration]):
        raised = rng.uniform(0.45, 1.2)
        recovery = 0.22
        # quick strokes are small ones, and the next one begins where this one has come to rest
        if world.rates == "real":
            raised *= min(1.0, max(0.35, (time - last) / 0.45))
            recovery = min(recovery, 0.35 * (following - time))
        # winding up and swinging take at most 0.65 of the time since the last stroke
        swing = min(rng.uniform(0.09, 0.2), 0.3 * (time - last))
        wind = min(0.35, 0.35 * (time - last))
        misses = rng.random() >= 0.85
        lowest = rng.uniform(0.22, 0.3) if misses else 0.0

        up = ease(progress(times, time - swing - wind, wind))
        down = progress(times, time - swing, swing)
        down = ease(down) if misses else down**2  # braked, or accelerated into the plate
        back = ease_out(progress(times, time, recovery))
        angle = np.where(times > time - swing - wind, lerp(rest, raised, up), angle)
        angle = np.where(times > time - swing, lerp(raised, lowest, down), angle)
        angle = np.where(times > time, lerp(lowest, rest, back), angle)
        if not misses:
            # 0.22: a mallet carries less than a falling body
            speed = 0.22 * 2 * raised * arm / swing
            world.impacts.append(Impact(time, middle, speed, "hammer", plate, head))
        last = time
    return np.interp(world.times, times, angle)


def act_hammer(world, rng, left, right):
    """A mallet strikes a plate on the floor; some swings stop short of it and make no sound."""
    width = right - left
    middle = (left + right) / 2
    floor = world.floor
    material = rng.choice(world.solids)
    plate = Thing.make(rng, material, min(rng.uniform(0.09, 0.18), 0.32 * width))
    heavy = ["wood", "metal", "rubber", "stone", "plastic"]
    head = Thing.make(rng, rng.choice(heavy), rng.uniform(0.045, 0.075))

    # the plate on its two feet
    thick = rng.uniform(0.025, 0.045)
    arm = min(rng.uniform(0.25, 0.45), 0.6 * width)
    side = rng.choice(SIDES)  # which way the arm points from its pivot
    top = floor - 0.03 - 2 * thick
    flat = (plate.size - 0.01, thick - 0.01)
    add = world.scenery.append
    add(Sprite(jitter(rng, plate.material), middle, top + thick, flat, 0.01))
    for foot in (middle - 0.6 * plate.size, middle + 0.6 * plate.size):
        add(Sprite(plain((0.25, 0.25, 0.28)), foot, floor - 0.015, (0.01, 0.01), 0.005))

    angle = swing_mallet(world, rng, middle, arm, plate, head)
    pivot_x = middle - side * arm
    pivot_y = top - head.size
    x = pivot_x + side * arm * np.cos(angle)
    y = pivot_y - arm * np.sin(angle)
    turn = -side * angle
    # the stand, the handle, the head
    stand = (0.004, (floor - pivot_y) / 2)
    add(Sprite(plain((0.3, 0.3, 0.33)), pivot_x, (pivot_y + floor) / 2, stand, 0.008))
    add = world.sprites.append
    handle = plain((0.45, 0.32, 0.2))
    add(Sprite(handle, (x + pivot_x) / 2, (y + pivot_y) / 2, (arm / 2, 0.002), 0.009, turn))
    half = (head.size * 0.4, head.size * 0.75)
    add(Sprite(jitter(rng, head.material), x, y, half, head.size * 0.25, turn))


def act_drip(world, rng, left, right):
    """Drops form at a tap, fall and splash into a trough of water."""
    middle = (left + right) / 2
    half = min(0.2, 0.4 * (right - left))
    gravity = rng.uniform(1.8, 4.0)
    tap = rng.uniform(0.06, 0.3)
    surface = world.floor - rng.uniform(0.05, 0.12)
    depth = (world.floor - surface) / 2
    water = jitter(rng, "water")

    # the trough's rims, its water, the tap
    rim = jitter(rng, rng.choice(["stone", "metal", "ceramic", "wood"]))
    add = world.scenery.append
    for x in (middle - half - 0.01, middle + half + 0.01):
        add(Sprite(rim, x, world.floor - depth - 0.012, (0.004, depth + 0.002), 0.01))
    add(Sprite(water, middle, surface + depth, (half - 0.005, depth - 0.005), 0.005))
    add(Sprite(jitter(rng, "metal"), middle, tap / 2 - 0.02, (0.02, tap / 2), 0.015))

    foam = plain((0.85, 0.95, 1.0))
    add = world.sprites.append
    for time in rhythm(world, rng, 0.3):
        # a drop grows for a quarter of a second, then lets go
        size = rng.uniform(0.022, 0.042)
        fall = math.sqrt(2 * (surface - tap - 2 * size) / gravity)
        since = world.times - (time - fall)
        y = tap + size + gravity * np.clip(since, 0, None) ** 2 / 2
        alpha = np.clip(1 + since / 0.25, 0, 1) * (world.times < time)
        add(Sprite(water, middle, y, (0.0, 0.1 * size), size, alpha=alpha))

        # its splash: a ripple and a droplet to each side
        splashed = world.times >= time
        after = np.clip(world.times - time, 0, None)
        fade = np.clip(1 - after / 0.5, 0, 1) * splashed
        hop = surface - after * (0.6 + 4 * size) + gravity * after**2
        in_air = splashed * (hop < surface + 0.01)
        for side in SIDES:
            x = middle + side * np.minimum(after * 0.35, half - 0.03)
            add(Sprite(foam, x, surface + 0.004, (0.012, 0.0), 0.007, alpha=fade))
            x = middle + side * after * 0.25
            add(Sprite(water, x, hop, (0, 0), 0.3 * size + 0.006, alpha=in_air))

        bubble = Thing.make(rng, "water", size)
        basin = Thing.make(rng, "water", size)
        speed = gravity * fall * math.sqrt(size / 0.05)  # a larger drop is louder
        world.impacts.append(Impact(time, middle, speed, "drip", bubble, basin))


def glide(world, rng, thing, post, low, high, kind):
    """Positions at `world.times` of a thing that moves in smooth bursts between `low` and `high`.

    Some bursts end at a post, from which it bounces. The world gets the impacts and rubs.
    """
    times = world.fine_times
    bounce = MATERIALS[thing.material].bounce
    here = rng.uniform(low, high)
    now = rng.uniform(0.2, 2.0)
    x = np.full(len(times), here)
    while now < world.duration - 0.8:
        target = rng.uniform(low, high)
        span = rng.uniform(0.6, 1.8)
        bumps = rng.random() < 0.45
        if bumps:
            # aims beyond the post, so that it hits it at speed
            wall = low if rng.random() < 0.5 else high
            target = wall + 1.1 * (wall - here)
        # too short a way to see
        if abs(target - here) < 0.15:
            now += 0.1
            continue

        u = progress(times, now, span)
        path = lerp(here, target, u - np.sin(2 * np.pi * u) / (2 * np.pi))
        if bumps:
            direction = np.sign(wall - here)
            arrived = (path - wall) * direction >= 0
            bumps = arrived[-1]  # the clip may end before
        if bumps:
            hit = int(np.argmax(arrived))
            time = times[hit]
            speed = abs(path[hit] - path[hit - 1]) * FINE
            # it rolls back for 0.3 s, ever slower, beginning at the speed that the bounce leaves
            back = ease_out(progress(times, time, 0.3))
            away = wall - direction * 0.5 * bounce * speed * 0.3 * back
            path = np.where(times < time, path, away)
            target = float(away[-1])
            span = time + 0.3 - now
            world.impacts.append(Impact(time, wall, speed, "wall", thing, post))
        x = np.where(times > now, path, x)
        here = target
        burst = (times >= now) & (times < now + span)
        speed = np.abs(np.gradient(path[burst])) * FINE
        world.rubs.append(Rub(now, speed, kind, thing))
        now += span + rng.exponential(0.8) + 0.15
    return np.interp(world.times, times, x)


def act_glide(world, rng, left, right):
    """A ball rolls, or a rod pushes a block, in smooth bursts; some bursts run into a post."""
    ball = rng.random() < 0.5
    material = rng.choice([name for name in world.solids if not ball or name != "cardboard"])
    thing = Thing.make(rng, material, min(rng.uniform(0.05, 0.09), 0.25 * (right - left)))
    post = add_posts(world, rng, left, right, rng.uniform(0.2, 0.45))
    size = thing.size
    kind = "roll" if ball else "scrape"
    x = glide(world, rng, thing, post, left + 0.02 + size, right - 0.02 - size, kind)
    y = np.full(len(x), world.floor - size)
    # most blocks hang on a rod
    if not ball and rng.random() < 0.7:
        middle = (y - size) / 2
        world.sprites.append(Sprite(plain((0.35, 0.35, 0.4)), x, middle, (0.006, middle), 0.006))
    add_with_shadow(world, jitter(rng, material), ball, size, x, y)


ACTS = (act_bodies, act_hammer, act_drip, act_glide)
ACT_SHARES = {"usual": (0.46, 0.23, 0.12, 0.19), "real": (0.22, 0.58, 0.12, 0.08)}


# ---- distractors: what moves and never touches anything, and so makes no sound -----------------
# each returns its sprites, given a thing's half-size and look, three frequencies
# (radians a second) and phases


def drift(world, rng, size, look, frequency, phase):
    """A ball or box wanders through the air, turning."""
    t = world.times
    x = 0.5 + 0.45 * np.sin(frequency[0] * t + phase[0])
    y = 0.3 + 0.2 * np.sin(frequency[1] * 2 * t + phase[1])
    look = plain(rng.uniform(0.2, 0.95, 3))
    ball = rng.random() < 0.5
    return [body_sprite(look, ball, size, x, y, frequency[2] * 3 * t)]


def pendulum(world, rng, size, look, frequency, phase):
    """A ball swings on a thread from the top."""
    length = rng.uniform(0.2, 0.45)
    pivot = rng.uniform(0.2, 0.8)
    swing = rng.uniform(0.3, 0.9) * np.sin(world.times * (2 + 3 * frequency[0]) + phase[0])
    x = pivot + length * np.sin(swing)
    y = length * np.cos(swing)
    half = (0.002, length / 2)
    line = Sprite(plain(0.2), (x + pivot) / 2, y / 2, half, 0.004, -swing)
    return [line, body_sprite(look, True, size * 0.8, x, y)]


def bird(world, rng, size, look, frequency, phase):
    """Two flapping wings cross the sky."""
    t = world.times
    x = (rng.choice(SIDES) * 0.25 * frequency[0] * 3 * t + phase[0]) % 1.4 - 0.2
    y = 0.15 + 0.05 * np.sin(t + phase[1])
    flap = 0.6 * np.sin(t * 9 + phase[2])
    dark = plain((0.12, 0.12, 0.15))
    return [
        Sprite(dark, x + side * 0.03, y - 0.02 * flap, (0.03, 0.0), 0.008, -side * flap)
        for side in SIDES
    ]


def car(world, rng, size, look, frequency, phase):
    """A car drives past behind the stage."""
    x = (rng.choice(SIDES) * 0.6 * frequency[0] * world.times + phase[0]) % 1.8 - 0.4
    y = world.floor - 0.16
    body = Sprite(plain(rng.uniform(0.2, 0.9, 3), 0.4), x, y, (0.09, 0.02), 0.015)
    cabin = Sprite(plain((0.7, 0.8, 0.9)), x, y - 0.045, (0.045, 0.015), 0.012)
    tire = plain(0.1)
    wheels = [body_sprite(tire, True, 0.024, x + side * 0.06, y + 0.035) for side in SIDES]
    return [body, cabin, *wheels]


def yoyo(world, rng, size, look, frequency, phase):
    """A ball on a thread goes up and down, and turns back clear of the floor."""
    x = rng.uniform(0.15, 0.85)
    height = np.cos(world.times * (1.5 + 4 * frequency[0]) + phase[0])
    y = 0.35 * world.floor + 0.25 * height
    return [thread(x, y), body_sprite(look, True, size, x, y)]


def arc(world, rng, size, look, frequency, phase):
    """A ball or box flies through the picture and out again, in 2.4 s."""
    s = world.times - rng.uniform(1, max(1, world.duration - 1))  # since it passed the middle
    speed = rng.choice(SIDES) * rng.uniform(0.5, 1.2)
    ball = rng.random() < 0.5
    x = 0.5 + speed * s
    y = 0.25 + rng.uniform(0.2, 0.5) * s * s
    return [body_sprite(look, ball, size, x, y, 4 * s, np.abs(s) < 1.2)]


DISTRACTORS = (drift, pendulum, bird, car, yoyo, arc)


def distract(world, rng):
    """Adds something that moves and makes no sound."""
    kind = rng.choice(DISTRACTORS)
    material = rng.choice(world.solids)
    size = rng.uniform(0.04, 0.09)
    frequency = rng.uniform(0.15, 0.7, 3)
    phase = rng.uniform(0, 7, 3)
    world.sprites += kind(world, rng, size, jitter(rng, material), frequency, phase)


# ---- worlds ------------------------------------------------------------------------------------


def imagine(rng, times, duration: float, solids: tuple, rates: str):
    """One try at a world: a floor, up to three distractors, up to three acts side by side."""
    floor = rng.uniform(0.74, 0.9)
    ground = Thing.make(rng, rng.choice(FLOORS), 0.25)
    world = World(floor, ground, times, duration, solids, rates)
    look = jitter(rng, ground.material)
    world.scenery.append(Sprite(look, 0.5, floor + 0.5, (0.9, 0.495), 0.005))
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.35, 0.35, 0.2, 0.1])):
        distract(world, rng)
    lanes = int(rng.choice([0, 1, 2, 3], p=[0.05, 0.5, 0.35, 0.1]))
    world.lanes = lanes
    for k in range(lanes):
        left = 0.05 + 0.9 * k / lanes
        right = 0.05 + 0.9 * (k + 1) / lanes
        act = rng.choice(ACTS, p=ACT_SHARES[rates])
        act(world, rng, left + 0.015, right - 0.015)
    return world


def acceptable(world) -> bool:
    """Some impacts, few of them crowded; or only rubbing; or a stage deliberately left empty."""
    if world.tangled:
        return False
    hits = [hit.time for hit in world.audible()]
    if world.lanes == 0 or not hits:
        return world.lanes == 0 or len(world.rubs) > 0
    # at most 12 in 8.192 s, none within 30 ms, at most 30 % within 120 ms of the one before
    gaps = np.diff(hits, prepend=-1.0)
    few = len(hits) <= max(3, MOST_HITS[world.rates] * world.duration)
    return few and gaps.min() > 0.03 and np.mean(gaps < 0.12) <= 0.3


def make_world(
    rng, times, duration: float, solids: tuple = SOLIDS["usual"], rates: str = "usual"
) -> World:
    """The first acceptable world of the random stream, or the hundredth."""
    for _ in range(100):
        world = imagine(rng, times, duration, solids, rates)
        if acceptable(world):
            break
    return world


# ---- picture -----------------------------------------------------------------------------------


def pattern(name: str, u, v):
    """How much of the second color shows at (u, v), the body's own coordinates in [-1, 1]."""
    match name:
        case "grain":
            return 0.5 + 0.5 * np.sin(9 * v + 1.5 * np.sin(3 * u))
        case "brushed":
            return 0.5 + 0.5 * np.sin(5 * (u + v))
        case "rings":
            return 0.5 + 0.5 * np.cos(9 * np.hypot(u, v))
        case "rim":
            edge = 2.5 * np.maximum(np.abs(u), np.abs(v)) ** 4
            return np.clip(edge + 0.4 * (np.hypot(u, v) > 0.75), 0, 1)
        case "band":
            return (np.abs(v) < 0.28) * 1.0
        case "dots":
            return (np.sin(5 * u) * np.sin(5 * v) > 0.45) * 1.0
        case "halves":
            return (u > 0) * 1.0
        case "mottle":
            along = np.sin(7 * u + 3 * np.sin(5 * v))
            across = np.sin(8 * v + 2 * np.sin(6 * u))
            return 0.5 + 0.5 * along * across
        case "tape":
            return (np.abs(u) < 0.2) * 1.0
        case "waves":
            return 0.5 + 0.5 * np.sin(6 * v + np.sin(8 * u))
    raise ValueError(f"no pattern {name!r}")


def place(sprite, first: int, canvas, scale: int, pad: int):
    """Where a sprite is on a canvas (f, h, w, 3) of frames `first` on.

    Returns the indices (n,) of the frames that show it and, in pixels and each (n, 1, 1): x, y,
    half width and height with the corners, angle, alpha, half size of an upright patch to hold it.
    """
    count, canvas_height, canvas_width, _ = canvas.shape

    def each(value, factor=1.0, shift=0.0):
        value = np.asarray(value, np.float32)
        value = value[first : first + count] if value.ndim else np.full(count, value)
        return value * np.float32(factor) + np.float32(shift)

    def visible(center, reach, length):
        return np.abs(2 * center - length) < length + 2 * reach + 2

    x = each(sprite.x, scale, pad)
    y = each(sprite.y, scale, pad)
    width, height = (each(value, scale, sprite.corner * scale) for value in sprite.half)
    angle = each(sprite.angle)
    alpha = each(sprite.alpha)
    reach_x = width
    reach_y = height
    # a disc does not change by turning
    if np.any(angle) and np.any(sprite.half):
        reach_x = reach_y = np.hypot(width, height)
    in_view = visible(x, reach_x, canvas_width) & visible(y, reach_y, canvas_height)
    seen = np.flatnonzero(in_view & (alpha > 0.01))
    values = (x, y, width, height, angle, alpha, reach_x, reach_y)
    return seen, [value[seen, None, None] for value in values]


def patch(center, reach):
    """First pixel (n, 1, 1) of a patch and its pixels' distances (n, 1, q) from a center."""
    reach = reach.max()
    start = np.floor(center - reach - 1)
    return start, start + 0.5 - center + np.arange(math.ceil(2 * reach) + 4, dtype=np.float32)


def shade(look, dx, dy, u, v, width, height, scale: int):
    """The color (n, p, q, 3), or (3,) if plain, `dx`, `dy` from a sprite's center; u, v: turned."""
    color = np.float32(look.color)
    if look.pattern == "plain" and not look.shine:
        return color
    if look.pattern != "plain":
        tile = np.float32(0.12 * scale)  # large things repeat their pattern
        mix = pattern(look.pattern, u / np.minimum(width, tile), v / np.minimum(height, tile))
        color = lerp(color, np.float32(look.second), mix[..., None])
    # light from above left, however the body is turned, and a highlight
    across = dx / width
    down = dy / height
    light = 1 - np.float32(0.2) * (across + down)
    away = (across + np.float32(0.35)) ** 2 + (down + np.float32(0.4)) ** 2
    highlight = np.float32(look.shine) * np.exp(-10 * away)
    return color * light[..., None] + highlight[..., None]


def overlap(start: int, length: int, limit: int):
    """Where a patch from pixel `start` on lies in a picture: its slice of both."""
    begin = max(start, 0)
    end = max(min(start + length, limit), begin)
    return slice(begin, end), slice(begin - start, end - start)


def paint(sprite, canvas, first: int, scale: int, pad: int):
    """Paints a sprite into a canvas float32 (f, h, w, c) of frames `first` on, all at once.

    scale: pixels a picture width; pad: of the canvas around the picture. Edges are one pixel soft.
    """
    seen, values = place(sprite, first, canvas, scale, pad)
    if not len(seen):
        return
    x, y, width, height, angle, alpha, reach_x, reach_y = values
    left, dx = patch(x, reach_x)  # (n, 1, q)
    top, dy = patch(y, reach_y)
    dy = dy.swapaxes(1, 2)  # (n, p, 1)

    # along the body's own axes
    u = dx
    v = dy
    if np.any(angle):
        cos = np.cos(angle)
        sin = np.sin(angle)
        u = cos * dx + sin * dy  # (n, p, q)
        v = cos * dy - sin * dx

    # distance from the straight part: what is farther than the corner's radius lies outside
    radius = np.float32(sprite.corner * scale)
    beyond_x = np.maximum(np.abs(u) - (width - radius), 0)
    beyond_y = np.maximum(np.abs(v) - (height - radius), 0)
    inside = np.clip(radius + 0.5 - np.hypot(beyond_x, beyond_y), 0, 1)
    alpha = (inside * alpha)[..., None]  # (n, p, q, 1)
    color = shade(sprite.look, dx, dy, u, v, width, height, scale)
    color = np.broadcast_to(color, (*alpha.shape[:3], canvas.shape[3]))

    _, height, width, _ = alpha.shape
    for k, frame in enumerate(seen):
        y, patch_y = overlap(int(top[k, 0, 0]), height, canvas.shape[1])
        x, patch_x = overlap(int(left[k, 0, 0]), width, canvas.shape[2])
        opacity = alpha[k, patch_y, patch_x]
        view = canvas[frame, y, x]
        view += opacity * (color[k, patch_y, patch_x] - view)


def backdrop(rng, size: int):
    """A soft picture float32 (size, size, 3) to stand behind everything."""
    kind = rng.choice(["gradient", "checks", "stripes", "clouds"])
    a, b = rng.uniform(0.15, 0.95, (2, 3))
    turn = rng.uniform(0, 2 * np.pi)
    # sharp edges get less contrast
    if kind in ("checks", "stripes"):
        b = lerp(a, b, rng.uniform(0.1, 0.5))
    cells = rng.uniform(3, 9)
    ramp = np.arange(size, dtype=np.float32) / size
    x, y = np.meshgrid(ramp, ramp)
    u = x * np.cos(turn) + y * np.sin(turn)
    v = y * np.cos(turn) - x * np.sin(turn)
    if kind == "gradient":
        mix = u - u.min()
    elif kind == "clouds":
        waves = rng.uniform(-14, 14, (12, 2))
        mix = 0.5 + sum(np.sin(x * p + y * q + turn * k) / 8 for k, (p, q) in enumerate(waves))
    else:
        wave = np.sin(np.pi * cells * u)
        if kind == "checks":
            wave = wave * np.sin(np.pi * cells * v)
        mix = np.clip(0.5 + 4 * wave, 0, 1)
    return np.float32(a) + mix[..., None].astype(np.float32) * np.float32(b - a)


def shaking(rng, times):
    """A hand-held camera's wander (f, 2) in picture widths, or none."""
    amount = rng.choice([0.0, 0.004, 0.012, 0.02], p=[0.45, 0.2, 0.2, 0.15])
    offset = 0
    for _ in range(3):
        frequency = rng.uniform(1, 14, 2)  # radians a second
        phase = rng.uniform(0, 7, 2)
        offset = offset + np.sin(times[:, None] * frequency + phase) / 3
    return amount * offset


def crop(canvas, offset, size: int):
    """The picture (size, size, 3) at a place x, y between pixels of a canvas (h, w, 3)."""
    x, y = offset.astype(int)
    share_x, share_y = np.float32(offset % 1)
    view = canvas[y : y + size + 1, x : x + size + 1]
    if share_x or share_y:
        view = lerp(view[:, :-1], view[:, 1:], share_x)
        view = lerp(view[:-1], view[1:], share_y)
    return view[:size, :size]


def render(world, rng, size: int):
    """The world's frames, uint8 (f, size, size, 3)."""
    # the stage is a little larger than the picture, as far as a camera may shake; the backdrop
    # larger still, as far as it may drift
    total = len(world.times)
    pad = math.ceil(0.021 * size) + 1
    side = size + 2 * pad
    roam = round(0.3 * size)
    back = backdrop(rng, side + roam)
    other = backdrop(rng, side + roam)
    # the drift in the course of the clip: none, slow or fast
    direction = rng.uniform(-1, 1, 2)
    way = direction * roam * rng.choice([0, 1, 3], p=[0.5, 0.3, 0.2])
    origin = rng.uniform(0, roam, 2)
    changes = rng.random() < 0.25
    # light of a tint, which may flicker
    light = rng.uniform(0.65, 1.15) * (1 + rng.uniform(-0.08, 0.08, 3)) * 255
    depth = rng.choice([0.0, 0.03, 0.1], p=[0.6, 0.25, 0.15])
    flicker = 1 + depth * np.sin(world.times * rng.uniform(1, 25) + rng.uniform(0, 7))
    camera = shaking(rng, world.times) * size + pad
    start = rng.uniform(0, world.duration)  # of the change to another backdrop

    # what never moves is painted once
    scenery = np.zeros((1, side, side, 3), np.float32)
    cover = np.zeros((1, side, side, 1), np.float32)
    for sprite in world.scenery:
        paint(sprite, scenery, 0, size, pad)
        paint(replace(sprite, look=plain(1.0)), cover, 0, size, pad)  # its opacity

    frames = np.empty((total, size, size, 3), np.uint8)
    # 16 frames at a time stay in the CPU's cache
    for first in range(0, total, 16):
        times = world.times[first : first + 16]
        canvas = np.empty((len(times), side, side, 3), np.float32)
        for picture, time in zip(canvas, times, strict=True):
            # to and fro within the backdrop
            corner = origin + way / world.duration * time
            x, y = np.abs((corner + roam) % (2 * roam) - roam).astype(int)
            picture[:] = back[y : y + side, x : x + side]
            if changes:
                mix = np.float32(progress(time, start, 1.5))
                picture += mix * (other[y : y + side, x : x + side] - picture)
        canvas *= 1 - cover
        canvas += scenery
        for sprite in world.sprites:
            paint(sprite, canvas, first, size, pad)
        for k, picture in enumerate(canvas, first):
            gain = np.float32(light * flicker[k])
            frames[k] = np.clip(crop(picture, camera[k], size) * gain, 0, 255)
    return frames


# ---- sound -------------------------------------------------------------------------------------


def noise_spectrum(rng, length: int, center: float, octaves: float = 1.0):
    """Spectrum of `length` samples of noise, a Gaussian bell `octaves` wide around a frequency."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)[1:]
    spectrum[1:] *= np.exp(-((np.log2(frequency / center) / octaves) ** 2))
    return spectrum


def ring(thing, strength: float, rng):
    """The sound (n,) of one thing hit with a strength from 0 to 1, peak 1: resonances and noise.

    Size lowers the pitch, a harder hit is brighter.
    """
    material = MATERIALS[thing.material]
    pitch = material.pitch * (0.08 / thing.size) ** 0.7
    length = round(SAMPLE_RATE * min(max(material.decay, 8 * material.hiss_decay), 2.5))
    time = np.arange(length, dtype=np.float32) / SAMPLE_RATE

    # resonances: the higher, the shorter
    wave = np.zeros(length, np.float32)
    for ratio, detune in zip(material.ratios, thing.detune, strict=True):
        frequency = pitch * ratio * detune
        decay = material.decay / ratio**0.5
        weight = ratio ** -(material.tilt + 0.8 * (1 - strength)) * rng.uniform(0.7, 1.3)
        # none near half the sampling rate
        if frequency > 0.47 * SAMPLE_RATE:
            continue
        s = time[: round(decay * SAMPLE_RATE)]
        turns = frequency * s
        if thing.material == "water":
            turns = turns * (1 + 0.6 * np.minimum(s / 0.06, 1.5))  # a bubble's note rises
        tone = weight * np.sin(2 * np.pi * turns, dtype=np.float32)
        wave[: len(s)] += tone * np.exp(-6.9 / decay * s)  # 6.9 = ln 1000, 60 dB
    wave /= max(np.abs(wave).max(), 1e-6)

    # contact noise
    s = time[: round(7 * material.hiss_decay * SAMPLE_RATE)]
    center = material.hiss_pitch * (0.5 + 0.6 * strength)
    noise = np.fft.irfft(noise_spectrum(rng, len(s), center), len(s))
    noise = noise * np.exp(-s / material.hiss_decay)
    wave[: len(s)] += material.hiss * noise / np.abs(noise).max()
    wave[:8] *= np.arange(8) / 8  # half a millisecond of attack: no click of its own
    return wave / np.abs(wave).max()


def rubbing(rub, rng):
    """The sound float32 (n,) of a rub: colored noise, as loud as the movement is fast.

    A rolling thing also thumps once a turn.
    """
    material = MATERIALS[rub.thing.material]
    length = round(len(rub.speed) / FINE * SAMPLE_RATE)
    samples = np.arange(length)
    speed = np.interp(samples / SAMPLE_RATE, np.arange(len(rub.speed)) / FINE, rub.speed)
    if rub.kind == "roll":
        center = 6 * material.pitch**0.5
        octaves = 0.8
        turn = np.cumsum(speed) / SAMPLE_RATE / rub.thing.size
        wobble = 1 + 0.4 * np.sin(turn)
    else:
        center = 1.2 * (material.pitch * material.hiss_pitch) ** 0.5
        octaves = 1.1
        wobble = 1.0
    spectrum = noise_spectrum(rng, length, center, octaves)
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, length)
    loudness = np.minimum(speed / 0.8, 1.2)  # full at 0.8 a second
    fade = np.minimum(np.minimum(samples, samples[::-1]) / (0.03 * SAMPLE_RATE), 1)
    return (0.03 * noise / max(noise.std(), 1e-9) * loudness * wobble * fade).astype(np.float32)


def sound(world, rng, samples: int):
    """The world's sound, float32 (samples,), peak below 1.

    Every audible impact at its sample, the rubbing, a small room and its quiet tone.
    """
    dry = np.zeros(samples + 3 * SAMPLE_RATE, np.float32)

    def add(wave, time):
        start = round(time * SAMPLE_RATE)
        dry[start : start + len(wave)] += wave

    for hit in world.audible():
        for thing, gain in ((hit.thing, 0.5), (hit.other, 0.15)):
            add(gain * hit.strength * ring(thing, hit.strength, rng), hit.time)
    for rub in world.rubs:
        add(rubbing(rub, rng), rub.start)

    # the room's impulse response: the sound itself, then noise that falls by 60 dB
    length = round(rng.uniform(0.08, 0.35) * SAMPLE_RATE)
    tail = rng.standard_normal(length) * np.exp(-6.9 * np.linspace(0, 1, length))
    tail *= rng.uniform(0.1, 0.35) / np.sqrt(np.sum(tail**2))
    tail[0] += 1.0
    size = 1 << (samples + length).bit_length()
    spectrum = np.fft.rfft(dry[:samples], size) * np.fft.rfft(tail, size)
    wet = np.fft.irfft(spectrum, size)[:samples]
    # the room's own noise, -68 to -58 dB
    wet += 10 ** (rng.uniform(-68, -58) / 20) * rng.standard_normal(samples)
    return (wet * min(1.0, 0.95 / np.abs(wet).max())).astype(np.float32)


# ---- clips and files ---------------------------------------------------------------------------


class Clip(NamedTuple):
    """What one file holds."""

    frames: np.ndarray  # uint8 (f, h, w, 3)
    wav: np.ndarray  # float32 (n,), as long as the picture
    labels: dict


def frame_count(duration: float, fps: float) -> int:
    """How many frames a clip has; its true duration is that many frames'."""
    return max(1, round(duration * fps))


def make_clip(
    seed: int,
    index: int,
    size: int = 96,
    fps: float = 15.625,
    duration: float = 8.192,
    materials: str = "usual",
    rates: str = "usual",
) -> Clip:
    """Clip `index` of set `seed`, of things made of `SOLIDS[materials]`.

    rates: "usual", 0.6 hits a second on average; "real", 2 and up to 8, as in films of impacts.
    """
    # streams of their own: the same world at any size
    world_rng, picture_rng, sound_rng = (np.random.default_rng([seed, index, k]) for k in range(3))
    total = frame_count(duration, fps)
    duration = total / fps
    world = make_world(world_rng, np.arange(total) / fps, duration, SOLIDS[materials], rates)
    onsets = [
        {
            "time": round(float(hit.time), 5),
            "material": hit.thing.material,
            "strength": round(float(hit.strength), 4),
            "kind": hit.kind,
            "other": hit.other.material,
        }
        for hit in world.audible()
    ]
    sustained = [
        {
            "start": round(float(rub.start), 5),
            "end": round(float(rub.start) + len(rub.speed) / FINE, 5),
            "kind": rub.kind,
            "material": rub.thing.material,
            "strength": round(float(min(rub.speed.max() / 0.8, 1.2)), 4),
        }
        for rub in world.rubs
    ]
    labels = {
        "onsets": onsets,
        "sustained": sustained,
        "seed": seed,
        "index": index,
        "duration": duration,
        "fps": fps,
        "size": size,
        "materials": materials,
        "floor": world.ground.material,
    }
    # the first sets did not know others
    if rates != "usual":
        labels["rates"] = rates
    wav = sound(world, sound_rng, round(duration * SAMPLE_RATE))
    return Clip(render(world, picture_rng, size), wav, labels)


def write_clip(clip: Clip, path):
    """H.264 (yuv420p) and AAC, both from time zero.

    One thread each, so that the same clip gives the same bytes. Raises FileError.
    """
    rate = Fraction(clip.labels["fps"]).limit_denominator(1000)
    with atomic_write(path) as part, av.open(str(part), "w", format="mp4") as out:
        options = {"preset": "ultrafast", "crf": "20", "threads": "1"}
        video = out.add_stream("libx264", rate=rate, options=options)
        video.width = video.height = clip.labels["size"]
        video.pix_fmt = "yuv420p"
        options = {"aac_coder": "fast"}
        audio = out.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options=options)
        audio.bit_rate = 64000
        for i, picture in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        # 1024 samples are a frame of AAC
        for start in range(0, len(clip.wav), 1024):
            samples = clip.wav[None, start : start + 1024]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            frame.pts = start
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))


def write_files(out, index: int, settings: dict):
    """Clip `index` and its labels, by `make_clip`'s settings, into folder `out`.

    The video is written last, so that its presence means that both are complete.
    """
    path = Path(out) / f"{index:05d}.mp4"
    clip = make_clip(index=index, **settings)
    write_bytes(path.with_suffix(".json"), (json.dumps(clip.labels) + "\n").encode())
    write_clip(clip, path)


def missing_clips(out, indices, settings: dict) -> list:
    """The indices without a file. Raises UserError if a file there is a clip of another set."""
    missing = []
    for index in indices:
        path = Path(out) / f"{index:05d}.mp4"
        if not path.exists():
            missing.append(index)
            continue
        defaults = {"materials": "usual", "rates": "usual"}
        expected = {**defaults, **settings, "index": index}
        fps = settings["fps"]
        expected["duration"] = frame_count(settings["duration"], fps) / fps
        try:
            # labels of old sets do not name the materials, nor usual rates
            labels = {**defaults, **json.loads(path.with_suffix(".json").read_text())}
            same = expected.items() <= labels.items()
        except (OSError, ValueError, TypeError):
            same = False
        if not same:
            raise UserError(
                f"{path}: not a clip of this set (seed, size, fps, duration, materials or rates "
                "differ); give another OUT"
            )
    return missing


def make_set(out, clips: int, workers: int = 1, start: int = 0, **settings) -> int:
    """Writes clips start ... start + clips - 1 into a folder; returns how many are complete.

    settings: of `make_clip`; seed, size, fps and duration must be given. Clips already in the
    folder are kept. Ctrl-C finishes those being written. Raises UserError.
    """
    make_folder(out)
    indices = range(start, start + clips)
    missing = missing_clips(out, indices, settings)
    # workers leave Ctrl-C to this process, which lets them finish what they write
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore_interrupt)
    bar = tqdm(total=clips, initial=clips - len(missing), unit="clip", smoothing=0.05)
    with pool, bar:
        jobs = [pool.submit(write_files, out, index, settings) for index in missing]
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update()
        except KeyboardInterrupt:
            pass
        finally:
            pool.shutdown(cancel_futures=True)
    return clips - len(missing_clips(out, indices, settings))


def main(argv=None) -> int:
    """Exit status: 1 for an error in one line, 130 if interrupted."""
    parser = cli.Parser("foley.py", __doc__)
    add = parser.add_argument
    add("out", metavar="OUT", help="folder for 00000.mp4, 00000.json, ...; clips there are kept")
    add("--clips", type=cli.number(int, 1), default=1000, help="how many")
    add(
        "--seed",
        type=cli.number(int, 0),
        default=0,
        help="which set; its clip i is always the same",
    )
    add("--start", type=cli.number(int, 0), default=0, help="number of the first clip")
    add(
        "--size",
        type=cli.number(int, 32, 2048),
        default=96,
        help="width and height in pixels, even",
    )
    add("--fps", type=cli.number(float, 4, 120), default=15.625, help="frames a second")
    add("--duration", type=cli.number(float, 2, 120), default=8.192, help="seconds")
    add(
        "--materials",
        choices=list(SOLIDS),
        default="usual",
        help="what things are made of; other: four materials that the usual set does not have, to "
        "fine-tune on",
    )
    add(
        "--rates",
        choices=list(ACT_SHARES),
        default="usual",
        help="how often things are hit; real: as in films of impacts, up to 8 times a second",
    )
    add("--workers", type=cli.number(int, 1), default=1, help="processes")
    args = parser.parse_args(argv)
    if args.size % 2:
        parser.error(f"--size: {args.size} is odd; give an even number")
    try:
        complete = make_set(**vars(args))
    except UserError as error:
        print(f"foley.py: {error}", file=sys.stderr)
        return 1
    if complete < args.clips:
        print(
            f"foley.py: stopped at {complete} of {args.clips} clips; the same command makes the "
            "rest",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
