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

import contextlib
import queue
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

MAX_IN_A_ROW = 3  # turns of one class while the next class waits, which so gets at least every fourth
RECENT = 60.0  # seconds in which a client is no newcomer again; by then the rate limits allow an address two more
MAX_RECENT = 2000  # clients that are remembered, with their networks 2 MB; the oldest go first

Item = TypeVar("Item")
Path = tuple[str, ...]


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
        self._smallest = min(client_limit, network_limit)
        self._preferred, self._newcomers, self._others = _Node[Item](), _Node[Item](), _Node[Item]()
        self._recent: OrderedDict[str, float] = OrderedDict()  # when a stranger last came as a newcomer or had a turn
        self._served = {True: _Served(), False: _Served()}  # by whether they were preferred
        self._preferred_in_a_row = 0  # items that strangers had to wait for since one of them had its turn
        self._newcomers_in_a_row = 0  # items that the others had to wait for since one of them had its turn
        self._idle = 0  # threads in get() that have no item yet
        self._lock = threading.Lock()
        # One entry for each waiting item. A thread waits for an entry without the lock, so that it is woken only once.
        self._added: queue.SimpleQueue[None] = queue.SimpleQueue()

    def serves_at_once(self) -> bool:
        """Return whether a thread is free for an item that is added now: then its class and account do not matter."""
        with self._lock:
            return self._idle > self._waiting

    def put(self, item: Item, path: Path, *, preferred: bool, limited: bool) -> list[Item]:
        """Add an item, and return the items that lost their place to it: at most one, which may be the new one.

        The item is added first. If that is one too many for its client, its middle network or all strangers, then the
        newest item of the largest part of these is lost, if possible not a newcomer's: so a flood displaces itself.

        Args:
            item: what ``get`` will return.
            path: the networks of the provider, the site and the home, the client, and the account that the item is of.
            preferred: whether it probably comes from the owner of an account.
            limited: whether the limits of a client and of a network apply. They would do harm where all clients appear
                to have one address, as behind a proxy that is not trusted.
        """
        client = path[-2]
        with self._lock:
            if preferred:
                self._preferred.add((item, path), path)
            elif time.monotonic() - self._recent.get(client, -RECENT) >= RECENT:
                self._newcomers.add((item, path), path)
                self._remember(client)
            else:
                self._others.add((item, path), path)
            # One loss is enough: before this item, nothing had too many. The narrowest excess is the cause of the rest.
            crowd = (self._preferred,) if preferred else (self._others, self._newcomers)
            few = self._waiting <= min(self.class_limit, self._smallest)  # then nothing has too many
            for depth, limit in () if few else (*(self._limits if limited else ()), (0, self.class_limit)):
                if sum(top.count(path[:depth]) for top in crowd) > limit:
                    return [self._drop(path[:depth], crowd, self._served[preferred])]
        self._added.put(None)
        return []

    def get(self) -> Item:
        """Wait for an item; remove and return the one that has its turn.

        Preferred items come first. While strangers wait as well, at least one of four is theirs, so that a flood with
        preferred items does not keep everybody else out. In the same way newcomers come before other strangers.
        """
        with self._lock:
            self._idle += 1
        while True:
            self._added.get()
            with self._lock:
                if self._waiting:
                    self._idle -= 1
                    return self._take()

    def _take(self) -> Item:
        if self._preferred.waiting and not (self._strangers and self._preferred_in_a_row >= MAX_IN_A_ROW):
            self._preferred_in_a_row += bool(self._strangers)
            item, path = self._preferred.take()
            self._served[True].add(path)
            return item
        self._preferred_in_a_row = 0
        if self._newcomers.waiting and not (self._others.waiting and self._newcomers_in_a_row >= MAX_IN_A_ROW):
            self._newcomers_in_a_row += bool(self._others.waiting)
            item, path = self._newcomers.take()
        else:
            self._newcomers_in_a_row = 0
            item, path = self._others.take()
        self._served[False].add(path)
        self._remember(path[-2])
        return item

    def remove(self, condition: Callable[[Item], bool]) -> list[Item]:
        """Remove and return the items for which the condition holds."""
        with self._lock:
            newcomers = self._newcomers.remove(condition)
            for _, path in newcomers:
                self._recent.pop(path[-2], None)  # it may try again as a newcomer
            removed = [*self._preferred.remove(condition), *newcomers, *self._others.remove(condition)]
        for _ in removed:
            with contextlib.suppress(queue.Empty):  # a thread that has taken the entry will find no item
                self._added.get_nowait()
        return [item for item, _ in removed]

    def _drop(self, path: Path, crowd: Sequence[_Node[Item]], served: _Served) -> Item:
        if not path:  # the largest network of all classes, so that newcomers of one network displace no others
            sizes: Counter[str] = Counter()
            for top in crowd:
                sizes.update(top.sizes())
            path = (served.choose(sizes, ()),)
        top = next(top for top in crowd if top.count(path))  # in this network a newcomer only if there is nobody else
        item, its_path = top.drop(path, served)
        if top is self._newcomers:
            self._recent.pop(its_path[-2], None)  # it may try again as a newcomer
        return item

    def _remember(self, client: str) -> None:
        self._recent[client] = time.monotonic()
        self._recent.move_to_end(client)
        if len(self._recent) > MAX_RECENT:
            self._recent.popitem(last=False)

    @property
    def _strangers(self) -> int:
        return self._newcomers.waiting + self._others.waiting

    @property
    def _waiting(self) -> int:
        return self._preferred.waiting + self._strangers


class _Node(Generic[Item]):
    """The items of a class, a network, a client or an account, each with its path. Only an account holds items."""

    def __init__(self) -> None:
        self.waiting = 0
        self._children: OrderedDict[str, _Node[Item]] = OrderedDict()  # the next one to have its turn comes first
        self._items: list[tuple[Item, Path]] = []

    def add(self, item: tuple[Item, Path], path: Path) -> None:
        """Add an item to the account that the path leads to."""
        self.waiting += 1
        node = self
        for name in path:
            node = node._children.get(name) or node._children.setdefault(name, _Node())
            node.waiting += 1
        node._items.append(item)

    def count(self, path: Path) -> int:
        """Return how many items wait below the node that the path leads to."""
        if not path:
            return self.waiting
        return self._children[path[0]].count(path[1:]) if path[0] in self._children else 0

    def take(self) -> tuple[Item, Path]:
        """Remove and return the item that has its turn. Then each of its nodes goes behind its siblings."""
        self.waiting -= 1
        if not self._children:
            return self._items.pop(0)
        name, child = next(iter(self._children.items()))
        if child.waiting > 1:
            self._children.move_to_end(name)
        else:
            del self._children[name]
        return child.take()

    def sizes(self) -> dict[str, int]:
        """Return how many items wait below each child."""
        return {name: child.waiting for name, child in self._children.items()}

    def remove(self, condition: Callable[[Item], bool]) -> list[tuple[Item, Path]]:
        """Remove and return the items for which the condition holds."""
        removed = [entry for entry in self._items if condition(entry[0])]
        self._items = [entry for entry in self._items if not condition(entry[0])]
        for name, child in list(self._children.items()):
            removed += child.remove(condition)
            self._remove_empty(name)
        self.waiting -= len(removed)
        return removed

    def drop(self, path: Path, served: _Served, above: Path = ()) -> tuple[Item, Path]:
        """Remove and return the newest item of the largest part of the node that the path leads to.

        ``above`` is the path of this node.
        """
        self.waiting -= 1
        if not self._children:
            return self._items.pop()
        name = path[0] if path else served.choose(self.sizes(), above)
        item = self._children[name].drop(path[1:], served, (*above, name))
        self._remove_empty(name)
        return item

    def _remove_empty(self, name: str) -> None:
        if not self._children[name].waiting:
            del self._children[name]


class _Served:
    """Which networks, clients and accounts had a turn, and in which order."""

    def __init__(self) -> None:
        self._turns: OrderedDict[Path, int] = OrderedDict()
        self._turn = 0

    def add(self, path: Path) -> None:
        """Record a turn."""
        self._turn += 1
        for depth in range(1, len(path) + 1):
            self._turns[path[:depth]] = self._turn
            self._turns.move_to_end(path[:depth])
        while len(self._turns) > MAX_RECENT:
            self._turns.popitem(last=False)

    def choose(self, sizes: Mapping[str, int], above: Path) -> str:
        """Return the largest part of the node ``above``; of several, the one that had its turn last.

        So somebody who had none keeps a place beside those who come again and again. The rest is chance: the newest or
        the oldest could be chosen so that others lose each time.
        """
        most = max(sizes.values())
        turns = {name: self._turns.get((*above, name), 0) for name, size in sizes.items() if size == most}
        latest = max(turns.values())
        return secrets.choice([name for name, turn in turns.items() if turn == latest])
