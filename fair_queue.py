"""A bounded queue that is fair between networks, clients and accounts.

It holds work that anybody on the internet can ask for, and that takes long: password hashes (web/server.py), each a
quarter of a second of a core, and mails with links (mail.py), each about as long as the mail server takes. With first
come, first served, fifty addresses that always have something waiting would keep everybody else out, and so would one
home, which has millions of IPv6 addresses. So turns go round by network instead, and a full queue takes a place away
from the network that holds the most of them.

Items are in one of three classes. The preferred ones are those that probably come from the owner of an account. They
go first, so a flood of items from strangers hardly delays them. Strangers have two classes: the first item of a client
within a minute, which goes before its further ones. So somebody who comes for the first time need not wait for every
address of an attacker again and again.
"""

from __future__ import annotations

import itertools
import queue
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

MAX_IN_A_ROW = 3  # turns of one class while a later class waits, which so gets at least every fourth
RECENT = 60.0  # seconds in which a client is no newcomer again; by then the rate limits allow an address two more
MAX_RECENT = 2000  # clients that are remembered, with their networks 2 MB; the oldest go first

Item = TypeVar("Item")
Key = TypeVar("Key")
Path = tuple[str, ...]
Entry = tuple[Item, Path, bool]  # an item, its path, and whether it is preferred
Turns = OrderedDict[Path, float]  # the number of the latest turn of each network, client and account


class FairQueue(Generic[Item]):
    """Holds items until a thread takes them. All methods may be called from any thread.

    Args:
        class_limit: the number of preferred items that may wait, and the number of items of strangers.
        client_limit: the number of these that may be of one client.
        network_limit: the number of these that may be of one /24 or /48.
    """

    def __init__(self, class_limit: int, client_limit: int, network_limit: int) -> None:
        self.class_limit = class_limit
        # How many parts of a path lead to the nodes that have a limit of their own. The narrowest comes first.
        self._limits = (4, client_limit), (2, network_limit)
        self._preferred, self._newcomers, self._others = _Node[Item](), _Node[Item](), _Node[Item]()
        self._classes = self._preferred, self._newcomers, self._others  # in the order of their turns
        self._recent: OrderedDict[str, float] = OrderedDict()  # when a stranger last came as a newcomer or had a turn
        self._turns: dict[bool, Turns] = {True: OrderedDict(), False: OrderedDict()}  # by whether it was preferred
        self._numbers = itertools.count(1)  # of turns
        self._lock = threading.Lock()
        # A thread that finds no item is idle. It is then handed the next one, which so has nothing to wait for.
        self._idle = 0
        self._handed = queue.SimpleQueue[Item]()

    def serves_at_once(self) -> bool:
        """Return whether a thread is free for an item that is added now: then its class and account do not matter."""
        return self._idle > 0

    def lengths(self) -> tuple[int, int]:
        """Return how many preferred items wait, and how many others."""
        return self._preferred.waiting, self._newcomers.waiting + self._others.waiting

    def put(self, item: Item, path: Path, *, preferred: bool, limited: bool) -> list[Item]:
        """Add an item, and return the items that lost their place to it: at most one, which may be the new one.

        An idle thread gets it at once. Else it is added first. If that is one too many for its client, its middle
        network or all strangers, then the newest item of the largest part of these is lost, if possible not a
        newcomer's: so a flood displaces itself.

        Args:
            item: what ``get`` will return.
            path: the networks of the provider, the site and the home, the client, and the account that the item is of.
            preferred: whether it probably comes from the owner of an account.
            limited: whether the limits of a client and of a network apply. They would do harm where all clients appear
                to have one address, as behind a proxy that is not trusted.
        """
        client, entry = path[-2], (item, path, preferred)
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._handed.put(item)
                if not preferred:
                    _remember(self._recent, client, time.monotonic())
                return []
            if preferred:
                self._preferred.add(entry)
            elif time.monotonic() - self._recent.get(client, -RECENT) >= RECENT:
                self._newcomers.add(entry)
                _remember(self._recent, client, time.monotonic())
            else:
                self._others.add(entry)
            # One loss is enough: before this item, nothing had too many. The narrowest excess is the cause of the rest.
            crowd = (self._preferred,) if preferred else (self._others, self._newcomers)
            for depth, limit in (*(self._limits if limited else ()), (0, self.class_limit)):
                if sum(top.count(path[:depth]) for top in crowd) > limit:
                    return [self._drop(path[:depth], crowd, self._turns[preferred])]
        return []

    def get(self) -> Item:
        """Wait for an item; remove and return the one that has its turn.

        Preferred items come first. While strangers wait as well, at least one of four is theirs, so that a flood with
        preferred items does not keep everybody else out. In the same way newcomers come before other strangers.
        """
        with self._lock:
            if any(top.waiting for top in self._classes):
                item, path, preferred = self._take(*self._classes)
                turn = next(self._numbers)
                for depth in range(1, len(path) + 1):
                    _remember(self._turns[preferred], path[:depth], turn)
                if not preferred:
                    _remember(self._recent, path[-2], time.monotonic())
                return item
            self._idle += 1
        return self._handed.get()

    def remove(self, condition: Callable[[Item], bool]) -> list[Item]:
        """Remove and return the items for which the condition holds."""
        with self._lock:
            newcomers = self._newcomers.remove(condition)
            for _, path, _ in newcomers:
                self._recent.pop(path[-2], None)  # it may try again as a newcomer
            removed = [*self._preferred.remove(condition), *newcomers, *self._others.remove(condition)]
        return [item for item, *_ in removed]

    def _take(self, first: _Node[Item], *later: _Node[Item]) -> Entry[Item]:
        """Remove and return the item that has its turn. The later classes together get one of four turns."""
        others_wait = any(top.waiting for top in later)
        if first.waiting and not (others_wait and first.in_a_row >= MAX_IN_A_ROW):
            first.in_a_row += others_wait
            return first.take()
        first.in_a_row = 0
        return self._take(*later)

    def _drop(self, path: Path, crowd: Sequence[_Node[Item]], turns: Turns) -> Item:
        if not path:  # the largest network of all classes, so that newcomers of one network displace no others
            path = (_choose(sum((top.sizes() for top in crowd), Counter[str]()), (), turns),)
        top = next(top for top in crowd if top.count(path))  # in this network a newcomer only if there is nobody else
        item, its_path, _ = top.drop(path, turns)
        if top is self._newcomers:
            self._recent.pop(its_path[-2], None)  # it may try again as a newcomer
        return item


class _Node(Generic[Item]):
    """The items of a class, a network, a client or an account. Only an account holds them itself."""

    def __init__(self) -> None:
        self.waiting = 0
        self.in_a_row = 0  # of a class: its turns since a later class, which waited for them, had one
        self._children: OrderedDict[str, _Node[Item]] = OrderedDict()  # the next one to have its turn comes first
        self._items: list[Entry[Item]] = []

    def add(self, entry: Entry[Item]) -> None:
        """Add an item to the account that its path leads to."""
        self.waiting += 1
        node = self
        for name in entry[1]:
            node = node._children.get(name) or node._children.setdefault(name, _Node())
            node.waiting += 1
        node._items.append(entry)

    def count(self, path: Path) -> int:
        """Return how many items wait below the node that the path leads to."""
        if not path:
            return self.waiting
        return self._children[path[0]].count(path[1:]) if path[0] in self._children else 0

    def take(self) -> Entry[Item]:
        """Remove and return the item that has its turn. Then each of its nodes goes behind its siblings."""
        self.waiting -= 1
        if not self._children:
            return self._items.pop(0)
        name, child = self._children.popitem(last=False)
        if child.waiting > 1:
            self._children[name] = child
        return child.take()

    def sizes(self) -> Counter[str]:
        """Return how many items wait below each child."""
        return Counter({name: child.waiting for name, child in self._children.items()})

    def remove(self, condition: Callable[[Item], bool]) -> list[Entry[Item]]:
        """Remove and return the items for which the condition holds."""
        removed = [entry for entry in self._items if condition(entry[0])]
        self._items = [entry for entry in self._items if not condition(entry[0])]
        for name, child in list(self._children.items()):
            removed += child.remove(condition)
            self._remove_empty(name)
        self.waiting -= len(removed)
        return removed

    def drop(self, path: Path, turns: Turns, above: Path = ()) -> Entry[Item]:
        """Remove and return the newest item of the largest part of the node that the path leads to.

        ``above`` is the path of this node.
        """
        self.waiting -= 1
        if not self._children:
            return self._items.pop()
        name = path[0] if path else _choose(self.sizes(), above, turns)
        item = self._children[name].drop(path[1:], turns, (*above, name))
        self._remove_empty(name)
        return item

    def _remove_empty(self, name: str) -> None:
        if not self._children[name].waiting:
            del self._children[name]


def _choose(sizes: Mapping[str, int], above: Path, turns: Turns) -> str:
    """Return the largest part of the node ``above``; of several, the one that had its turn last.

    So somebody who had none keeps a place beside those who come again and again. The rest is chance: the newest or
    the oldest could be chosen so that others lose each time.
    """
    ranks = {name: (size, turns.get((*above, name), 0)) for name, size in sizes.items()}
    highest = max(ranks.values())
    return secrets.choice([name for name, rank in ranks.items() if rank == highest])


def _remember(latest: OrderedDict[Key, float], key: Key, moment: float) -> None:
    """Record the latest moment of a client or a network, in seconds or turns; beyond MAX_RECENT forget the oldest."""
    latest[key] = moment
    latest.move_to_end(key)
    if len(latest) > MAX_RECENT:
        latest.popitem(last=False)
