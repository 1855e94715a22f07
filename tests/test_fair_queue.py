"""The fair queue: whose turn it is, which item loses its place, and what that means for an honest client."""

from __future__ import annotations

import itertools
import random
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

import fair_queue
from fair_queue import FairQueue
from tests.crowd import awaited

CLASS_LIMIT, MAX_OF_CLIENT, MAX_OF_NETWORK = LIMITS = 64, 4, 16  # as for requests that wait for a hash in production
ACCOUNTS = "wnca", "wncb", "wnda", "woea", "xpfa"  # a path in letters: wide network, middle network, client, account

Path = tuple[str, ...]


class Queue(FairQueue[str]):
    """A queue with short names for the tests."""

    def __init__(self, class_limit: int = CLASS_LIMIT) -> None:
        super().__init__(class_limit, MAX_OF_CLIENT, MAX_OF_NETWORK)

    def add(self, item: str, path: Sequence[str] = "wnca", *, preferred: bool = False, limited: bool = True) -> str:
        """Add an item; return the one that lost its place, or ""."""
        wide, middle, client, account = path
        lost = self.put(item, (wide, middle, client, client, account), preferred=preferred, limited=limited)
        assert len(lost) <= 1
        return "".join(lost)

    def fill(self, path: Sequence[str], *items: str, preferred: bool = False, limited: bool = True) -> None:
        assert [item for item in items if self.add(item, path, preferred=preferred, limited=limited)] == []

    def get(self) -> str:
        assert any(top.waiting for top in self._classes)  # a failing test must not wait without end
        return super().get()

    def take(self, count: int) -> list[str]:
        return [self.get() for _ in range(count)]

    @property
    def strangers(self) -> int:
        """The number of waiting items of strangers."""
        return self._newcomers.waiting + self._others.waiting


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A queue in which every stranger is a newcomer."""
    monkeypatch.setattr(fair_queue, "RECENT", 0.0)
    return Queue()


Choices = list[list[str]]


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Choices:
    """The ties that were broken at random, each as the names of the equals. The last of them is chosen."""
    made: Choices = []

    def choose(names: list[str]) -> str:
        if len(names) > 1:
            made.append(names)
        return names[-1]

    monkeypatch.setattr(secrets, "choice", choose)
    return made


# Turns


def test_one_account_is_served_in_the_order_of_arrival(queue: Queue) -> None:
    queue.fill("wnca", "1", "2", "3")
    assert queue.take(3) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("wnca", "wncb"), ("wnca", "wnda"), ("wnca", "woca"), ("wnca", "xnca")],
    ids=["accounts", "clients", "middle networks", "wide networks"],
)
def test_turns_go_round(queue: Queue, one: str, other: str) -> None:
    queue.fill(one, "1", "2")
    queue.fill(other, "a", "b")
    assert queue.take(4) == ["1", "a", "2", "b"]


@pytest.mark.parametrize(
    ("crowd", "alone"),
    [
        (["wnca", "wncb"], "wnda"),
        (["wnca", "wnda"], "woea"),
        (["wnca", "wnda", "woea"], "xpfa"),
        (["wnca", "wncb", "wnda"], "xpfa"),
    ],
    ids=["accounts of a client", "clients of a network", "networks of a wide network", "a mixture"],
)
def test_many_in_one_place_have_one_turn_together(queue: Queue, crowd: list[str], alone: str) -> None:
    for path in crowd:
        queue.fill(path, f"{path}1", f"{path}2")
    queue.fill(alone, "1", "2")
    assert queue.take(4)[1::2] == ["1", "2"]


def test_within_their_turn_the_parts_of_a_network_go_round(queue: Queue) -> None:
    for path in ACCOUNTS:
        queue.fill(path, f"{path}1", f"{path}2")
    expected = ["wnca1", "xpfa1", "woea1", "xpfa2", "wnda1", "woea2", "wncb1", "wnda2", "wnca2", "wncb2"]
    assert queue.take(10) == expected


def test_a_newcomer_goes_behind_those_who_wait(queue: Queue) -> None:
    queue.fill("wnca", "1", "2")
    queue.fill("xpfa", "a", "b")
    assert queue.take(1) == ["1"]
    queue.fill("yqgb", "new")
    assert queue.take(4) == ["a", "2", "new", "b"]


def test_a_client_that_comes_back_is_a_newcomer(queue: Queue) -> None:
    queue.fill("wnca", "1")
    queue.fill("xpfa", "a", "b")
    assert queue.take(1) == ["1"]
    queue.fill("yqgb", "A")
    queue.fill("wnca", "2")
    assert queue.take(4) == ["a", "A", "2", "b"]


def test_an_empty_queue_remembers_nobody(queue: Queue) -> None:
    for number in range(100):
        queue.add("item", [f"wide {number}", *"nca"])
    queue.take(CLASS_LIMIT)
    assert not queue._newcomers._children
    assert not queue._others._children


# The two classes


def test_preferred_requests_go_first(queue: Queue) -> None:
    queue.fill("wnca", "1", "2")
    queue.fill("wnca", "p", "q", preferred=True)
    assert queue.take(4) == ["p", "q", "1", "2"]


def test_one_of_four_hashes_goes_to_the_others(queue: Queue) -> None:
    queue.fill("wnca", *"1234", preferred=False)
    for client in "cdef":
        queue.fill(f"wn{client}a", *"pppp", preferred=True)
    assert "".join(queue.take(20)) == "ppp1ppp2ppp3ppp4pppp"


@pytest.mark.parametrize("preferred", [True, False])
def test_one_class_has_every_turn_while_the_other_is_empty(queue: Queue, preferred: bool) -> None:
    for _ in range(3):
        queue.fill("wnca", *"1234", preferred=preferred)
        assert "".join(queue.take(4)) == "1234"


def test_preferred_requests_that_nobody_waited_for_do_not_count(queue: Queue) -> None:
    for client in "cde":
        queue.fill(f"wn{client}a", *"pppp", preferred=True)
    assert "".join(queue.take(6)) == "pppppp"
    queue.fill("wnca", "1")
    assert "".join(queue.take(4)) == "ppp1"


def test_a_turn_of_the_others_between_two_floods_begins_the_count_again(queue: Queue) -> None:
    queue.fill("wnca", *"123")
    queue.fill("wnca", *"pp", preferred=True)
    assert "".join(queue.take(3)) == "pp1"
    queue.fill("wnca", *"pppp", preferred=True)
    assert "".join(queue.take(6)) == "ppp2p3"


def test_each_class_has_limits_of_its_own(queue: Queue) -> None:
    queue.fill("wnca", *"1234")
    queue.fill("wnca", *"pqrs", preferred=True)
    assert queue.add("5") == "5"
    assert queue.add("t", preferred=True) == "t"
    assert queue.take(8) == [*"pqr", "1", "s", *"234"]


# Limits


def test_a_client_holds_4_places(queue: Queue) -> None:
    queue.fill("wnca", *"1234")
    queue.fill("wnda", *"abcd")
    assert (queue.add("5"), queue.add("e", "wnda")) == ("5", "e")
    queue.get()
    assert queue.add("6") == ""


def test_a_middle_network_holds_16_places(queue: Queue, choices: Choices) -> None:
    for client in "cdef":
        queue.fill(f"wn{client}a", *(f"{client}{number}" for number in range(4)))
    queue.fill("woga", "another network")
    assert queue.add("new", "wnga") == "f3"
    assert choices == [["c", "d", "e", "f"]]


def test_a_wide_network_has_no_limit_but_that_of_the_class(queue: Queue, choices: Choices) -> None:
    for network in "nopq":
        for client in "cdef":
            queue.fill(f"w{network}{client}a", *(f"{network}{client}{number}" for number in range(4)))
    assert queue.add("new", "wrga") == "qf3"
    assert choices == [["n", "o", "p", "q"], ["c", "d", "e", "f"]]


def test_the_largest_account_of_a_client_that_has_too_many_loses_its_newest_request(queue: Queue) -> None:
    queue.fill("wnca", *"123")
    queue.fill("wncb", "a")
    assert queue.add("b", "wncb") == "3"
    assert queue.take(4) == ["1", "a", "2", "b"]


def test_the_largest_client_of_a_network_that_has_too_many_loses_its_newest_request(queue: Queue) -> None:
    for client, count in {"c": 3, "d": 4, "e": 3, "f": 3, "g": 3}.items():
        queue.fill(f"wn{client}a", *(f"{client}{number}" for number in range(1, count + 1)))
    for network in "opqrs":  # a network without too many loses nothing, however large
        queue.fill(f"x{network}ca", *"1234", limited=False)
        queue.fill(f"x{network}da", *"1234", limited=False)
    assert queue.add("new", "wnha") == "d4"


def test_the_narrowest_part_that_has_too_many_loses_a_request(queue: Queue) -> None:
    queue.fill("wnca", *"1234")
    for client in "def":
        queue.fill(f"wn{client}a", *"ABCD")
    queue.fill("xnca", *"abcd")
    queue.fill("xoca", *map(str, range(40)), limited=False)
    assert queue.class_limit == queue.strangers + 4
    queue.class_limit -= 4
    assert queue.add("5", "wnca") == "5"  # its client, its network and its class have one too many
    assert queue.add("new", "wnga") in set("4D")  # its network and its class
    assert queue.add("new", "ynca") == "39"  # its class


@pytest.mark.parametrize(
    ("waiting", "lost"),
    [
        ({"wnca": 4, "xnca": 3}, "wnca4"),
        ({"wnca": 2, "woca": 3, "xnca": 4}, "woca3"),
        ({"wnca": 3, "wnda": 1, "xnca": 3}, "wnca3"),
        ({"wnca": 1, "wncb": 3, "wnda": 3, "xnca": 4}, "wncb3"),
        ({"wnca": 3, "wnda": 2, "woca": 4, "xnca": 4, "ynca": 4, "yoca": 4}, "wnca3"),
    ],
    ids=["wide network", "middle network", "client", "account", "level by level, so not the largest account"],
)
def test_a_full_class_takes_a_place_from_its_largest_part(queue: Queue, waiting: dict[str, int], lost: str) -> None:
    queue.class_limit = sum(waiting.values())
    for path, count in waiting.items():
        queue.fill(path, *(f"{path}{number}" for number in range(1, count + 1)))
    assert queue.add("new", "zpga") == lost


def test_a_request_that_makes_its_own_network_the_largest_may_be_lost_itself(queue: Queue, choices: Choices) -> None:
    queue.class_limit = 4
    queue.fill("wnca", "1", "2")
    queue.fill("xnca", "a", "b")
    assert queue.add("c", "xnca") == "c"
    assert choices == []


def test_equals_lose_at_random(queue: Queue) -> None:
    queue.class_limit = 4
    lost = Counter[str]()
    for _ in range(200):
        queue.fill("wnca", "1", "2")
        queue.fill("xnca", "a", "b")
        lost[queue.add("new", "ynca")] += 1
        queue.remove(lambda _: True)
    assert set(lost) == {"2", "b"}  # each is missing in one of 2**199 runs


@pytest.mark.parametrize("preferred", [False, True])
def test_of_equals_the_one_that_had_its_turn_last_loses(preferred: bool, moment: list[float]) -> None:
    queue = Queue(class_limit=3)
    for path in ("wnca", "xpfa", "yqga"):
        queue.fill(path, "served", preferred=preferred)
        queue.take(1)
        queue.fill(path, path, preferred=preferred)
    assert queue.add("new", "zrhb", preferred=preferred) == "yqga"
    assert queue.add("one more", "uuuu", preferred=preferred) == "xpfa"


def test_guesses_at_an_account_from_its_address_cost_its_owner_no_place(moment: list[float]) -> None:
    queue = Queue()
    for neighbour in "1234":
        queue.fill(["w", "n", "c", neighbour], neighbour, preferred=True)
    queue.take(1)
    queue.fill(["w", "n", "c", "1"], "1", preferred=True)
    queue.fill("wnco", "a guess")
    queue.take(3)
    queue.fill(["w", "n", "c", "2"], "2", "2", preferred=True)
    queue.remove(lambda item: item == "a guess")
    assert queue.add("owner", "wnco", preferred=True) != "owner"


def test_only_the_largest_draw_lots(queue: Queue, choices: Choices) -> None:
    queue.class_limit = 5
    queue.fill("wnca", "1", "2")
    queue.fill("xnca", "a")
    queue.fill("ynca", "A", "B")
    assert queue.add("new", "znca") == "B"
    assert choices == [["w", "y"]]


def test_only_the_class_is_limited_where_everybody_looks_like_one_client(queue: Queue) -> None:
    queue.class_limit = 128
    queue.fill("wnca", *map(str, range(128)), limited=False)
    assert queue.add("new", limited=False) == "new"
    assert queue.add("new", "wnda", limited=False) == "127"
    assert queue.take(2) == ["0", "new"]


def test_a_lost_request_is_not_served(queue: Queue) -> None:
    queue.class_limit = 2
    queue.fill("wnca", "1", "2")
    assert queue.add("a", "xnca") == "2"
    assert queue.take(2) == ["1", "a"]
    assert not queue.strangers


# Waiting, and the end


def test_get_waits_for_a_request() -> None:
    queue, taken = FairQueue[str](*LIMITS), SimpleQueue[str]()
    takers = [threading.Thread(target=lambda: taken.put(queue.get()), daemon=True) for _ in range(2)]
    for taker in takers:
        taker.start()
    assert awaited(lambda: queue._idle == 2)
    for item, preferred in [("1", False), ("p", True)]:
        queue.put(item, ("w", "n", "c", "a"), preferred=preferred, limited=True)
        assert taken.get(timeout=5) == item


def test_an_idle_thread_is_handed_one_request_and_keeps_it(queue: Queue) -> None:
    queue._idle = 1  # as if it had come, but not run since it was handed the request
    assert [queue.add(item) for item in "ab"] == ["", ""]
    assert queue.remove(lambda _: True) == ["b"]
    assert queue._handed.get(timeout=5) == "a"
    assert queue._handed.empty()


def test_all_requests_can_be_removed(queue: Queue) -> None:
    for path in ACCOUNTS:
        queue.fill(path, f"{path}1")
        queue.fill(path, f"{path}p", preferred=True)
    taken = queue.take(3)  # it would be the turn of the others
    assert sorted(taken + queue.remove(lambda _: True)) == sorted(f"{path}{name}" for path in ACCOUNTS for name in "1p")
    assert queue.remove(lambda _: True) == []
    queue.fill("wnca", "p", preferred=True)
    assert queue.take(1) == ["p"]


# A model: the same rules, written down as plainly as possible


class Model:
    """The rules as lists: each class is a list of (item, path), and each level has its order of names."""

    def __init__(self) -> None:
        self.classes: dict[bool, list[tuple[str, Path]]] = {True: [], False: []}
        self.orders: dict[tuple[bool, Path], list[str]] = {}
        self.in_a_row = 0
        self.turns: dict[tuple[bool, Path], int] = {}

    def put(self, item: str, path: Path, preferred: bool, limited: bool, choose: Callable[[list[str]], str]) -> str:
        waiting = self.classes[preferred]
        waiting.append((item, path))
        for depth in range(4):
            order = self.orders.setdefault((preferred, path[:depth]), [])
            if path[depth] not in order:
                order.append(path[depth])
        for depth, limit in [(3, MAX_OF_CLIENT), (2, MAX_OF_NETWORK), (0, CLASS_LIMIT)]:
            below = path[:depth]
            if self.count(preferred, below) > limit and (limited or not depth):
                while len(below) < 4:
                    sizes = {name: self.count(preferred, (*below, name)) for name in self.order(preferred, below)}
                    equals = {name: self.turns.get((preferred, (*below, name)), 0) for name in sizes}
                    equals = {name: turn for name, turn in equals.items() if sizes[name] == max(sizes.values())}
                    below = (*below, choose([name for name in equals if equals[name] == max(equals.values())]))
                lost = [each for each in waiting if each[1] == below][-1]
                self.remove(preferred, lost)
                return lost[0]
        return ""

    def get(self) -> str:
        preferred = bool(self.classes[True]) and not (self.classes[False] and self.in_a_row == 3)
        self.in_a_row = self.in_a_row + bool(self.classes[False]) if preferred else 0
        path: Path = ()
        while len(path) < 4:
            order = self.order(preferred, path)
            order.append(order.pop(0))
            path = (*path, order[-1])
        taken = next(each for each in self.classes[preferred] if each[1] == path)
        self.remove(preferred, taken)
        turn = max(self.turns.values(), default=0) + 1
        self.turns |= {(preferred, path[:depth]): turn for depth in range(1, 5)}
        return taken[0]

    def count(self, preferred: bool, path: Path) -> int:
        return sum(each[1][: len(path)] == path for each in self.classes[preferred])

    def order(self, preferred: bool, path: Path) -> list[str]:
        return self.orders[preferred, path]

    def remove(self, preferred: bool, one: tuple[str, Path]) -> None:
        self.classes[preferred].remove(one)
        for depth in range(4):
            if not self.count(preferred, one[1][: depth + 1]):
                self.order(preferred, one[1][:depth]).remove(one[1][depth])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_2000_steps_at_random_do_what_the_model_does(queue: Queue, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = Model(), random.Random(seed)
    lots = random.Random(seed)

    def choose(names: list[str]) -> str:
        return lots.choice(names) if len(names) > 1 else names[0]

    monkeypatch.setattr(secrets, "choice", choose)
    losses = gets = 0
    for number in range(2000):
        pressure = 0.9 if number // 200 % 2 else 0.3  # it fills up and empties in turn
        if steps.random() < pressure or not any(model.classes.values()):
            crowded = steps.randrange(5)  # levels of which only the first name is used
            path = tuple(str(steps.randrange(1 if level < crowded else 6)) for level in range(4))
            preferred, limited = steps.random() < 0.5, path[0] != "5"
            state = lots.getstate()
            expected = model.put(str(number), path, preferred, limited, choose)
            lots.setstate(state)
            assert queue.add(str(number), path, preferred=preferred, limited=limited) == expected
            losses += bool(expected)
        else:
            assert queue.get() == model.get()
            gets += 1
    assert losses > 100
    assert gets > 500
    assert sorted(queue.remove(lambda _: True)) == sorted(
        item for waiting in model.classes.values() for item, _ in waiting
    )


# Newcomers


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the queue, set by hand, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(fair_queue, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def served(moment: list[float]) -> Queue:
    """A queue with requests of the client "xpf", which had a hash a moment ago."""
    queue = Queue()
    queue.fill("xpfa", "0")
    assert queue.take(1) == ["0"]
    queue.fill("xpfa", "1", "2")
    queue.fill("xpfb", "a", "b")
    return queue


def test_newcomers_have_three_of_four_turns_while_others_wait(served: Queue) -> None:
    for name in "ABCDE":
        served.fill([name, "n", name, "a"], name)
    assert "".join(served.take(9)) == "ABC1DEa2b"


def test_a_second_request_of_a_newcomer_waits_with_the_others(moment: list[float]) -> None:
    queue = Queue()
    queue.fill("wnca", "1", "2")
    queue.fill("xpfa", "A", "B")
    assert queue.take(4) == ["1", "A", "2", "B"]


def test_a_newcomer_that_lost_its_place_is_still_a_newcomer(moment: list[float], choices: Choices) -> None:
    queue = Queue(class_limit=1)
    queue.fill("wnca", "1")
    assert queue.add("2", "xpfa") == "2"  # the last of the equals is chosen
    assert queue.take(1) == ["1"]
    queue.class_limit = 2
    queue.fill("wnca", "3")
    queue.fill("xpfa", "4")
    assert queue.take(2) == ["4", "3"]


def test_a_newcomer_keeps_its_place_while_others_wait(moment: list[float]) -> None:
    queue = Queue(class_limit=3)
    queue.fill("wnca", "1", "2", "3")
    assert queue.add("A", "xpfa") == "3"
    assert queue.add("B", "yqga") == "2"
    assert queue.take(3) == ["1", "A", "B"]


def test_a_client_holds_4_places_as_a_newcomer_and_after_that(moment: list[float]) -> None:
    queue = Queue()
    queue.fill("wnca", *"1234")
    assert queue.add("5", "wnca") == "5"


@pytest.mark.parametrize(("seconds", "order"), [(59, "ABC3D"), (60, "ABCD3")])
def test_a_client_is_a_newcomer_again_after_a_minute(
    served: Queue, moment: list[float], seconds: float, order: str
) -> None:
    served.take(4)
    moment[0] += seconds
    for name in "ABCD":
        served.fill([name, "n", name, "a"], name)
    served.fill("xpfa", "3")
    assert "".join(served.take(5)) == order


def test_a_preferred_request_makes_no_client_old(moment: list[float]) -> None:
    queue = Queue()
    queue.fill("wnca", "p", preferred=True)
    queue.take(1)
    queue.fill("xpfa", "0")
    queue.take(1)
    queue.fill("xpfa", "1", "2")
    queue.fill("wnca", "A")
    assert queue.take(3) == ["A", "1", "2"]


def test_the_clients_that_are_remembered_are_bounded(moment: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "MAX_RECENT", 3)
    queue = Queue()
    for number in range(10):
        queue.fill(["w", "n", f"client {number}", "a"], "item")
        queue.take(1)
    assert list(queue._recent) == ["client 7", "client 8", "client 9"]


@pytest.mark.parametrize(("preferred", "first"), [(False, "new"), (True, "again")])
def test_a_client_that_an_idle_thread_serves_is_no_newcomer(moment: list[float], preferred: bool, first: str) -> None:
    queue = Queue()
    queue._idle = 1
    queue.fill("wnca", "at once", preferred=preferred)
    queue.fill("wnca", "again")
    queue.fill("wnda", "new")
    assert queue.get() == first


def test_an_idle_thread_serves_at_once(moment: list[float]) -> None:
    queue = FairQueue[str](*LIMITS)
    assert not queue.serves_at_once()
    taken: SimpleQueue[str] = SimpleQueue()

    def take_two() -> None:
        for _ in range(2):
            taken.put(queue.get())

    thread = threading.Thread(target=take_two)
    thread.start()
    assert awaited(queue.serves_at_once)
    queue.put("1", tuple("wncca"), preferred=False, limited=True)
    assert taken.get(timeout=5) == "1"
    assert awaited(queue.serves_at_once)
    queue.put("2", tuple("wncca"), preferred=True, limited=True)
    assert taken.get(timeout=5) == "2"
    thread.join(5)
    assert not queue.serves_at_once()
    queue.put("3", tuple("wncca"), preferred=True, limited=True)
    assert not queue.serves_at_once()


# Simulated floods: what an honest client can rely on


class Flood:
    """Attackers who always have as many requests waiting as they can. One more of each arrives after each hash."""

    def __init__(self, queue: Queue, paths: list[Path], *, preferred: bool = False) -> None:
        self.queue, self.paths, self.preferred = queue, paths, preferred
        self.lost: list[str] = []
        for _ in range(5):
            self.press()

    def press(self) -> None:
        for path in self.paths:
            self.lost.append(self.queue.add("attacker", path, preferred=self.preferred))

    def turns_until(self, item: str, limit: int = 1000) -> int:
        """Return after how many hashes this item was served. The flood goes on meanwhile."""
        for turn in range(1, limit + 1):
            if self.queue.get() == item:
                return turn
            self.press()
        raise AssertionError(f"{item} was not served, lost: {item in self.lost}")


def paths_in(*parts: int) -> list[Path]:
    """Return the paths of attackers: so many wide networks, middle networks in each, clients in each of these."""
    wide, middle, clients = parts
    return [
        (f"wide {w}", f"middle {w}/{m}", f"client {w}/{m}/{c}", "")
        for w in range(wide)
        for m in range(middle)
        for c in range(clients)
    ]


HONEST: Path = ("honest", "honest", "honest", "")
SEEDS = range(2)


@pytest.fixture
def seeded(seed: int, monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Ties are broken by a generator with this seed."""
    generator = random.Random(seed)
    monkeypatch.setattr(secrets, "choice", generator.choice)
    return generator


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_50_networks_do_not_keep_a_stranger_out(queue: Queue, seeded: random.Random) -> None:
    paths = paths_in(50, 1, 1)
    seeded.shuffle(paths)
    flood = Flood(queue, paths)
    assert queue.strangers == CLASS_LIMIT
    for number in range(4):
        assert queue.add(f"honest {number}", HONEST) != f"honest {number}"
        assert flood.turns_until(f"honest {number}") <= 51


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_50_addresses_delay_a_newcomer_by_one_hash_once_each_has_had_a_turn(
    moment: list[float], seeded: random.Random
) -> None:
    queue = Queue()
    flood = Flood(queue, paths_in(50, 1, 1))
    queue.take(64)
    flood.press()
    for number in range(40):
        queue.add(f"honest {number}", [f"home {number}", "n", f"client {number}", "a"])
        assert flood.turns_until(f"honest {number}") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_newcomers_of_one_provider_displace_no_second_try_of_a_stranger(
    moment: list[float], seeded: random.Random
) -> None:
    queue, sites, second_tries = Queue(), itertools.cycle(range(3000)), []

    def pass_one_turn() -> str:
        """Serve one request, while one and a half arrive from new sites of one provider."""
        moment[0] += 0.125
        for site in itertools.islice(sites, seeded.choice((1, 2))):
            queue.add("attacker", ("provider", f"site {site}", f"client {site}", ""))
        return queue.get()

    for _ in range(300):
        pass_one_turn()
    for person in range(20):
        for attempt in (f"first {person}", f"second {person}"):
            assert queue.add(attempt, (f"home {person}", "n", f"person {person}", "")) != attempt
            turns = [pass_one_turn() for _ in range(16)]
            second_tries += [one for one in turns if one.startswith("second")]
    assert len(second_tries) == 20


def test_a_newcomer_that_waited_too_long_is_still_a_newcomer(moment: list[float]) -> None:
    queue = Queue()
    queue.fill("wnca", "1", "2")
    assert sorted(queue.remove(lambda _: True)) == ["1", "2"]
    queue.fill("wnca", "3")
    queue.fill("xpfa", "A")
    assert queue.take(2) == ["3", "A"]
    assert not queue._others._children


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("parts", "waiting"), [((1, 1, 250), MAX_OF_NETWORK), ((1, 250, 1), CLASS_LIMIT)], ids=["one /48", "one /32"]
)
def test_250_networks_of_one_customer_delay_a_stranger_by_one_hash(
    queue: Queue, seeded: random.Random, parts: tuple[int, int, int], waiting: int
) -> None:
    flood = Flood(queue, paths_in(*parts))
    assert queue.strangers == waiting
    for number in range(8):
        assert queue.add(f"honest {number}", HONEST) != f"honest {number}"
        assert flood.turns_until(f"honest {number}") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_300_sites_of_one_provider_delay_a_preferred_request_by_one_hash(queue: Queue, seeded: random.Random) -> None:
    flood = Flood(queue, paths_in(1, 300, 1), preferred=True)
    assert queue._preferred.waiting == CLASS_LIMIT
    for number in range(8):
        assert queue.add(f"honest {number}", HONEST, preferred=True) != f"honest {number}"
        assert flood.turns_until(f"honest {number}") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_strangers_delay_preferred_requests_by_one_hash_for_each_three(queue: Queue, seeded: random.Random) -> None:
    flood = Flood(queue, paths_in(64, 1, 1))
    people: list[Path] = [(f"site {number}", f"site {number}", f"site {number}", "") for number in range(12)]
    for number, path in enumerate(people):
        assert queue.add(f"honest {number}", path, preferred=True) == ""
    assert [flood.turns_until(f"honest {number}") for number in range(12)] == [1, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_flood_of_preferred_requests_leaves_one_of_four_hashes_to_a_stranger(
    queue: Queue, seeded: random.Random
) -> None:
    flood = Flood(queue, paths_in(50, 1, 1), preferred=True)
    for number in range(10):
        assert queue.add(f"honest {number}", HONEST) == ""
        assert flood.turns_until(f"honest {number}") <= 4
