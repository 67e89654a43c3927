"""Counts what one block of a kernel does on a V100, from its sm_70 machine code, without a card.

    block = Machine(disassembly, constants, words, threads).run(block_x, block_y)
    block.executed["HMMA.884.F32.F32.STEP0"], block.shared_waves, block.sectors

The integer instructions are interpreted, 32-bit registers of all threads side by side: they alone
decide where loops end and what is addressed. Shared memory keeps what is stored. Floating-point
instructions and global memory are counted and never computed; their results are poison, so that an
address made of one is found out: every address is checked against the tensors and the block's
shared memory.

Threads of a block that are not at one place go on from the lowest address, so that they meet again
where the branch ends, as on the card. Instructions are those that NVRTC makes of csrc/cuda; an
integer instruction that is not known here is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

POISON = np.uint32(0x7FC0DEAD)
SECTOR, LINE = 32, 128  # bytes of a request to L2, of a line of L1
MOST_STEPS = 2_000_000
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?P[\dT])\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_x_\d+|\$?[\w.$]+):\s*$")
_WORD = re.compile(r"c\[(0x[0-9a-f]+)\]\[(0x[0-9a-f]+)\]")
_ADDRESS = re.compile(r"\[(?:(R\d+|RZ)(?:\.\w+)?)?\+?(-?0x[0-9a-f]+)?\]")
# Nothing follows from them here: hints, and reconvergence, which the order above gives.
_IDLE = {"NOP", "BSSY", "BSYNC", "BMOV", "WARPSYNC", "YIELD", "BREAK", "DEPBAR", "MEMBAR"}


class Tensor(NamedTuple):
    """A pointer argument: where its bytes are thought to lie."""

    address: int
    nbytes: int


@dataclass
class Block:
    """What one block did. Instructions are those of warps.

    issued        warps' instructions, predicated off or not
    executed      by name with modifiers: those with at least one active thread
    longest       issued by the warp that issued most
    shared_waves  passes of 128 bytes through shared memory, bank conflicts among them; least_waves:
                  without the conflicts
    lines         128-byte lines that global loads and stores touch, per pass of a warp
    sectors       32-byte sectors asked for by loads; distinct: every sector once
    stored        sectors of stores
    """

    issued: int = 0
    executed: Counter = field(default_factory=Counter)
    longest: int = 0
    shared_waves: int = 0
    least_waves: int = 0
    lines: int = 0
    sectors: int = 0
    distinct: int = 0
    stored: int = 0


class _Instruction(NamedTuple):
    name: str
    predicate: tuple[int, bool] | None  # number, negated
    run: Callable | None  # of (machine, mask); None: counted only
    branch: tuple | None  # (kind, place or register, a second predicate where there is one)


class Machine:
    """One kernel's code and arguments. words: of Args, a Tensor for a pointer."""

    def __init__(
        self,
        code: str,
        constants: dict[int, bytes],
        words: list[Tensor | int],
        threads: int,
        shared_bytes: int,
    ) -> None:
        self.threads, self.shared_bytes = threads, shared_bytes
        self.tensors = [w for w in words if isinstance(w, Tensor)]
        arguments = [w.address if isinstance(w, Tensor) else w for w in words]
        bank = np.zeros(0x160 // 4, np.uint32)
        bank[0] = threads
        packed = np.array(arguments, np.int64).view(np.uint32)
        self.banks = {0: np.concatenate([bank, packed])}
        self.banks |= {n: np.frombuffer(b, np.uint32) for n, b in constants.items()}
        self.patterns: dict[tuple, tuple[int, int]] = {}
        self.program = self._decode(code)

    # --- running

    def run(self, block_x: int, block_y: int = 0) -> Block:
        N = self.threads
        self.registers = np.full((256, N), POISON, np.uint32)
        self.registers[255] = 0
        self.predicates = np.zeros((8, N), bool)
        self.predicates[7] = True
        lane = np.arange(N, dtype=np.uint32)
        self.special = {
            "SR_TID.X": lane,
            "SR_LANEID": lane & 31,
            "SR_CTAID.X": np.full(N, block_x, np.uint32),
            "SR_CTAID.Y": np.full(N, block_y, np.uint32),
            "SRZ": np.zeros(N, np.uint32),
        }
        self.memory = np.full(self.shared_bytes // 4 + 1, POISON, np.uint32)
        self.block, self.touched = Block(), []
        warps = -(-N // 32)
        issued = np.zeros(warps, np.int64)
        place, alive, everyone = np.zeros(N, np.int64), np.ones(N, bool), np.ones(N, bool)
        waiting = np.zeros(N, bool)  # at a barrier
        at, together = 0, True
        for _ in range(MOST_STEPS):
            if together:
                mask = everyone
                issued += 1
            else:
                if not alive.any():
                    break
                ready = alive & ~waiting
                if not ready.any():
                    waiting[:] = False
                    ready = alive
                at = int(place[ready].min())
                mask = ready & (place == at)
                issued += self._warps(mask)
            one = self.program[at]
            active = mask
            if one.predicate is not None:
                number, negated = one.predicate
                active = mask & (self.predicates[number] ^ negated)
            some = active is everyone or active.any()
            if some:
                count = warps if active is everyone else int(self._warps(active).sum())
                self.block.executed[one.name] += count
                if one.run is not None:
                    one.run(self, active)
            if one.branch is None or not some:
                if together:
                    at += 1
                else:
                    place[mask] = at + 1
                continue
            kind, target, *more = one.branch
            if kind == "barrier":
                if together:
                    at += 1
                else:
                    place[mask] = at + 1
                    waiting |= mask
                continue
            for flag in more:
                active = active & flag()
            if kind == "return":
                target = int(self.registers[target][active][0]) // 16
            if together and active.all():
                if kind == "exit":
                    break
                at = target
                continue
            if together:
                place[:] = at
                together = False
            place[mask & ~active] = at + 1
            if kind == "exit":
                alive &= ~active
            else:
                place[active] = target
            if alive.all() and not waiting.any() and (place == place[0]).all():
                together, at = True, int(place[0])
        else:
            raise RuntimeError(f"volta: a block of {N} threads does not end")
        self.block.issued, self.block.longest = int(issued.sum()), int(issued.max())
        if self.touched:
            self.block.distinct = len(np.unique(np.concatenate(self.touched)))
        return self.block

    @staticmethod
    def _warps(mask: np.ndarray) -> np.ndarray:
        return np.logical_or.reduceat(mask, np.arange(0, len(mask), 32)).astype(np.int64)

    def write(self, register: int, value: np.ndarray, mask: np.ndarray) -> None:
        if register != 255:
            np.copyto(self.registers[register], value, where=mask)

    def write_predicate(self, number: int, value: np.ndarray, mask: np.ndarray) -> None:
        if number != 7:
            np.copyto(self.predicates[number], value, where=mask)

    # --- memory

    def shared(self, address: np.ndarray, mask: np.ndarray, width: int) -> None:
        used = address[mask]
        if used.max() + width > self.shared_bytes:
            raise RuntimeError(f"volta: shared memory at {used.min()} .. {used.max()} + {width}")
        for lanes in self._passes(mask, width):
            waves, least = self._waves(address[lanes], width)
            self.block.shared_waves += waves
            self.block.least_waves += least

    def global_(self, address: np.ndarray, mask: np.ndarray, width: int, store: bool) -> None:
        used = address[mask]
        low, high = int(used.min()), int(used.max()) + width
        if not any(t.address <= low and high <= t.address + t.nbytes for t in self.tensors):
            raise RuntimeError(f"volta: global memory at {low:#x} .. {high:#x} is no tensor's")
        for warp in range(0, len(mask), 32):
            lanes = slice(warp, warp + 32)
            if not mask[lanes].any():
                continue
            mine = address[lanes][mask[lanes]]
            sectors = np.unique(np.concatenate([mine // SECTOR, (mine + width - 1) // SECTOR]))
            if store:
                self.block.stored += len(sectors)
            else:
                self.block.sectors += len(sectors)
                self.touched.append(sectors)
        for lanes in self._passes(mask, width):
            self.block.lines += len(np.unique(address[lanes] // LINE))

    def store(self, register: int, address: np.ndarray, mask: np.ndarray, width: int) -> None:
        for i in range(width // 4):
            value = self.registers[register + i if register != 255 else 255]
            self.memory[address // 4 + i] = value[mask]
        if width < 4:
            narrow = {1: np.uint8, 2: np.uint16}[width]
            self.memory.view(narrow)[address // width] = self.registers[register][mask]

    @staticmethod
    def _passes(mask: np.ndarray, width: int) -> list[np.ndarray]:
        """Active lanes of each pass: of a warp 32 lanes of 4 bytes, 16 of 8, 8 of 16."""
        size = 32 * 4 // max(width, 4)
        groups = (np.arange(i, min(i + size, len(mask))) for i in range(0, len(mask), size))
        return [g[mask[g]] for g in groups if mask[g].any()]

    def _waves(self, address: np.ndarray, width: int) -> tuple[int, int]:
        """(passes, passes without conflicts): words of one bank in different rows wait."""
        key = (width, (address - (address[0] & ~127)).tobytes())  # banks repeat every 128 bytes
        if key not in self.patterns:
            words = address // 4
            words = np.unique(np.concatenate([words + i for i in range(-(-width // 4))]))
            waves = int(np.bincount(words % 32).max())
            self.patterns[key] = waves, -(-len(words) // 32)
        return self.patterns[key]

    # --- decoding

    def _decode(self, code: str) -> list[_Instruction]:
        labels: dict[str, int] = {}
        lines = []
        for text in code.splitlines():
            if match := _LABEL.match(text):
                labels[match[1]] = len(lines)
            elif match := _LINE.search(text):
                assert int(match[1], 16) == 16 * len(lines), "one function, sixteen bytes each"
                lines.append(match)
        return [self._instruction(m, labels) for m in lines]

    def _instruction(self, match: re.Match, labels: dict[str, int]) -> _Instruction:
        _, guard, name, text = match.groups()
        predicate = None
        if guard and guard != "@PT":
            predicate = (7 if guard[-1] == "T" else int(guard[-1])), guard[1] == "!"
        operands = [o.strip().replace(".reuse", "") for o in text.split(",")] if text else []
        base, *mods = name.split(".")
        branch, run = None, None
        if base == "EXIT":
            branch = ("exit", 0)
        elif base == "BAR":
            branch = ("barrier", 0)
        elif base in ("BRA", "CALL") and "DIV" not in mods:  # .DIV: only if a warp has split
            branch = ("to", labels[re.search(r"`\((.*)\)", operands[-1])[1]])
            if len(operands) > 1:
                branch += (self._flag(operands[0]),)
        elif base == "RET":
            branch = ("return", _register(operands[0].split()[0]))
        elif base in ("LDS", "STS", "LDG", "STG"):
            run = self._memory(base, mods, operands)
        elif base not in _IDLE and base != "BRA":
            maker = getattr(self, f"_{base.lower()}", None)
            run = maker(mods, operands) if maker else self._float(base, mods, operands)
        return _Instruction(name, predicate, run, branch)

    def _value(self, text: str) -> Callable[[], np.ndarray]:
        """A 32-bit operand as uint32 [threads], signs and inversions applied."""
        negative, inverted = text.startswith("-") and not text[1].isdigit(), text.startswith("~")
        body = text.lstrip("-~") if negative or inverted else text
        body = re.sub(r"\.(U32|S32|64|H0_H0|H1_H1)$", "", body)
        if body.startswith("|"):
            raise RuntimeError(f"volta: the operand {text} is not known")
        if body.startswith("R"):
            number = _register(body)
            if negative:
                return lambda: np.uint32(0) - self.registers[number]
            if inverted:
                return lambda: ~self.registers[number]
            return lambda: self.registers[number]
        word = self._constant(body)
        word = -word if negative else ~word if inverted else word
        fixed = np.full(self.threads, word & 0xFFFFFFFF, np.uint32)
        return lambda: fixed

    def _constant(self, text: str, more: int = 0) -> int:
        if match := _WORD.fullmatch(text):
            bank, at = int(match[1], 16), int(match[2], 16) // 4 + more
            return int(self.banks[bank][at])
        return int(text, 16)

    def _pair(self, text: str) -> Callable[[], np.ndarray]:
        """A 64-bit operand, of two registers or words, as uint64."""
        if text.startswith("R"):
            number = _register(text)
            if number == 255:
                zero = np.zeros(self.threads, np.uint64)
                return lambda: zero
            return lambda: (
                self.registers[number]
                | (self.registers[number + 1].astype(np.uint64) << np.uint64(32))
            )
        high = self._constant(text, 1) if text.startswith("c[") else 0
        fixed = np.full(self.threads, self._constant(text) | high << 32, np.uint64)
        return lambda: fixed

    def _flag(self, text: str) -> Callable[[], np.ndarray]:
        number = 7 if text.lstrip("!") == "PT" else int(text.lstrip("!")[1:])
        if text.startswith("!"):
            return lambda: ~self.predicates[number]
        return lambda: self.predicates[number]

    def _write_pair(self, number: int, value: np.ndarray, mask: np.ndarray) -> None:
        if number != 255:
            self.write(number, value.astype(np.uint32), mask)
            self.write(number + 1, (value >> np.uint64(32)).astype(np.uint32), mask)

    # --- memory and floating point

    def _memory(self, base: str, mods: list[str], operands: list[str]) -> Callable:
        width = next((int(m) // 8 for m in mods if m in ("64", "128")), 4)
        width = next((int(m[1:]) // 8 for m in mods if m in ("U8", "S8", "U16", "S16")), width)
        where = operands[1] if base[0] == "L" else operands[0]
        match = _ADDRESS.fullmatch(where)
        if not match:
            raise RuntimeError(f"volta: the address {where} is not known")
        offset = int(match[2], 16) if match[2] else 0
        number = _register(match[1]) if match[1] else 255
        register = _register(operands[0] if base[0] == "L" else operands[1])
        load, high, words = base[0] == "L", base[2] == "G", max(1, width // 4)

        def run(m: Machine, mask: np.ndarray) -> None:
            address = m.registers[number].astype(np.int64)
            if high:
                address = address + (m.registers[number + 1].astype(np.int64) << 32)
                m.global_(address + offset, mask, width, not load)
            else:
                address = address + offset & 0xFFFFFFFF
                m.shared(address, mask, width)
                if not load:
                    m.store(register, address[mask], mask, width)
            for i in range(words if load else 0):
                if high or width < 4:
                    m.write(min(register + i, 255), POISON, mask)
                elif register != 255:
                    m.registers[register + i][mask] = m.memory[address[mask] // 4 + i]

        return run

    def _float(self, base: str, mods: list[str], operands: list[str]) -> Callable | None:
        """Poison in the registers, false in the predicates."""
        known = base in ("HMMA", "SHFL", "VOTE", "LDC", "MUFU", "F2F") or base[0] in "FH"
        if not known:
            raise RuntimeError(f"volta: the instruction {base} is not known")
        predicates, registers = [], []
        for o in operands:
            if re.fullmatch(r"P\d|PT", o) and not registers:
                predicates.append(7 if o == "PT" else int(o[1]))
            elif re.fullmatch(r"R\d+|RZ", o) and not registers:
                registers.append(_register(o))
            elif not re.fullmatch(r"P\d|PT|R\d+|RZ", o):
                break
            else:
                break
        if base == "HMMA" and registers:
            registers.append(min(registers[0] + 1, 255))

        def run(m: Machine, mask: np.ndarray) -> None:
            for p in predicates[: 2 if base in ("FSETP", "HSETP2") else 1]:
                m.write_predicate(p, np.False_, mask)
            for r in registers:
                m.write(r, POISON, mask)

        return run

    def _mufu(self, mods: list[str], operands: list[str]) -> Callable:
        """Of a division: the integers are corrected after it, as for the card's approximation."""
        to = _register(operands[0])
        if mods[0] != "RCP" or not operands[1].startswith(("R", "c[")):
            return lambda m, mask: m.write(to, POISON, mask)
        a = self._value(operands[1])

        def run(m: Machine, mask: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                m.write(to, (np.float32(1) / a().view(np.float32)).view(np.uint32), mask)

        return run

    def _i2f(self, mods: list[str], operands: list[str]) -> Callable:
        to = _register(operands[0])
        if mods and mods[0] == "U64":
            a = self._pair(operands[1])
        else:
            a = self._value(operands[1])
            if not mods or mods[0] != "U32":
                signed = a
                a = lambda: signed().view(np.int32)  # noqa: E731

        def run(m: Machine, mask: np.ndarray) -> None:
            m.write(to, a().astype(np.float32).view(np.uint32), mask)

        return run

    def _f2i(self, mods: list[str], operands: list[str]) -> Callable:
        to, a = _register(operands[0]), self._value(operands[1])

        def run(m: Machine, mask: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                value = np.nan_to_num(a().view(np.float32).astype(np.float64))
            if "U64" in mods:
                m._write_pair(to, np.clip(value, 0, 1.8e19).astype(np.uint64), mask)
            else:
                least, most = (0, 2**32 - 1) if "U32" in mods else (-(2**31), 2**31 - 1)
                whole = np.clip(np.trunc(value), least, most).astype(np.int64)
                m.write(to, whole.astype(np.uint32), mask)

        return run

    # --- integers

    def _mov(self, mods: list[str], operands: list[str]) -> Callable:
        to, a = _register(operands[0]), self._value(operands[1])
        return lambda m, mask: m.write(to, a(), mask)

    def _s2r(self, mods: list[str], operands: list[str]) -> Callable:
        to, name = _register(operands[0]), operands[1]
        return lambda m, mask: m.write(to, m.special[name], mask)

    def _cs2r(self, mods: list[str], operands: list[str]) -> Callable:
        to, name = _register(operands[0]), operands[1]

        def run(m: Machine, mask: np.ndarray) -> None:
            m.write(to, m.special[name], mask)
            if "32" not in mods:
                m.write(min(to + 1, 255), m.special["SRZ"], mask)

        return run

    def _iadd3(self, mods: list[str], operands: list[str]) -> Callable:
        to, carries, terms, ins = _sum_operands(operands)
        values = [self._wide_term(t, "X" in mods) for t in terms]
        flags = [self._flag(p) for p in ins] if "X" in mods else []

        def run(m: Machine, mask: np.ndarray) -> None:
            total = values[0]() + values[1]() + values[2]()
            for flag in flags:
                total = total + flag()
            m.write(to, total.astype(np.uint32), mask)
            for i, p in enumerate(carries):
                m.write_predicate(p, total >> np.uint64(32) > i, mask)

        return run

    def _wide_term(self, text: str, extended: bool) -> Callable[[], np.ndarray]:
        """A term of a sum as uint64; -x is 2**32 - x, so that carries come out as the card's."""
        if text.startswith(("-R", "-c", "~")):
            body = self._value(text[1:])
            top = np.uint64((1 << 32) - (text[0] == "~"))
            return lambda: top - body().astype(np.uint64)
        value = self._value(text)
        return lambda: value().astype(np.uint64)

    def _imad(self, mods: list[str], operands: list[str]) -> Callable:
        to, carries, terms, ins = _sum_operands(operands)
        if "WIDE" in mods:
            return self._imad_wide(mods, to, carries, terms, ins)
        a, b = self._value(terms[0]), self._value(terms[1])
        if "HI" in mods:
            kind = np.uint64 if "U32" in mods else np.int64
            c = self._value(terms[2])

            def run_high(m: Machine, mask: np.ndarray) -> None:
                x, y = (_extended(v(), kind) for v in (a, b))
                high = (x * y).view(np.uint64) >> np.uint64(32)
                m.write(to, high.astype(np.uint32) + c(), mask)

            return run_high
        c = self._wide_term(terms[2], "X" in mods)
        flags = [self._flag(p) for p in ins] if "X" in mods else []

        def run(m: Machine, mask: np.ndarray) -> None:
            total = (a() * b()).astype(np.uint64) + c()
            for flag in flags:
                total = total + flag()
            m.write(to, total.astype(np.uint32), mask)
            for p in carries:
                m.write_predicate(p, total >> np.uint64(32) > 0, mask)

        return run

    def _imad_wide(self, mods: list, to: int, carries: list, terms: list, ins: list) -> Callable:
        a, b, c = self._value(terms[0]), self._value(terms[1]), self._pair(terms[2])
        kind = np.uint64 if "U32" in mods else np.int64
        flags = [self._flag(p) for p in ins] if "X" in mods else []

        def run(m: Machine, mask: np.ndarray) -> None:
            product = (_extended(a(), kind) * _extended(b(), kind)).view(np.uint64)
            total = product + c()
            over = total < product
            for flag in flags:
                more = total + flag()
                over |= more < total
                total = more
            m._write_pair(to, total, mask)
            for p in carries:
                m.write_predicate(p, over, mask)

        return run

    def _isetp(self, mods: list[str], operands: list[str]) -> Callable:
        compare, join = mods[0], next(m for m in mods if m in ("AND", "OR", "XOR"))
        kind = np.uint32 if "U32" in mods else np.int32
        first, second = (_predicate(o) for o in operands[:2])
        a, b, with_ = self._value(operands[2]), self._value(operands[3]), self._flag(operands[4])
        low = self._flag(operands[5]) if "EX" in mods else None
        tests = {
            "LT": np.less, "GT": np.greater, "LE": np.less_equal, "GE": np.greater_equal,
            "EQ": np.equal, "NE": np.not_equal,
        }  # fmt: skip
        strict = {"LE": "LT", "GE": "GT"}.get(compare, compare)

        def run(m: Machine, mask: np.ndarray) -> None:
            x, y = a().view(kind), b().view(kind)
            if low is None:
                result = tests[compare](x, y)
            elif compare == "EQ":
                result = (x == y) & low()
            elif compare == "NE":
                result = (x != y) | low()
            else:
                result = tests[strict](x, y) | ((x == y) & low())
            other = with_()
            how = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[join]
            yes, no = how(result, other), how(~result, other)
            m.write_predicate(first, yes, mask)
            m.write_predicate(second, no, mask)

        return run

    def _lop3(self, mods: list[str], operands: list[str]) -> Callable:
        predicate = 7
        if operands[0].startswith("P"):
            predicate, operands = _predicate(operands[0]), operands[1:]
        to, table = _register(operands[0]), int(operands[4], 16)
        a, b, c = (self._value(o) for o in operands[1:4])

        def run(m: Machine, mask: np.ndarray) -> None:
            value = _logic(table, a(), b(), c(), np.uint32(0xFFFFFFFF))
            m.write(to, value, mask)
            m.write_predicate(predicate, value != 0, mask)

        return run

    def _plop3(self, mods: list[str], operands: list[str]) -> Callable:
        first, second = (_predicate(o) for o in operands[:2])
        a, b, c = (self._flag(o) for o in operands[2:5])
        tables = [int(o, 16) for o in operands[5:7]]

        def run(m: Machine, mask: np.ndarray) -> None:
            values = [_logic(t, a(), b(), c(), np.True_) for t in tables]
            m.write_predicate(first, values[0], mask)
            m.write_predicate(second, values[1], mask)

        return run

    def _shf(self, mods: list[str], operands: list[str]) -> Callable:
        to = _register(operands[0])
        a, s, c = (self._value(o) for o in operands[1:4])
        signed = "S32" in mods or "S64" in mods

        def run(m: Machine, mask: np.ndarray) -> None:
            both = a() | (c().astype(np.uint64) << np.uint64(32))
            by = s().astype(np.uint64) & np.uint64(63 if "U64" in mods or "S64" in mods else 31)
            if mods[0] == "L":
                value = both << by
            elif signed:
                value = (both.view(np.int64) >> by.view(np.int64)).view(np.uint64)
            else:
                value = both >> by
            if "HI" in mods:
                value = value >> np.uint64(32)
            m.write(to, value.astype(np.uint32), mask)

        return run

    def _lea(self, mods: list[str], operands: list[str]) -> Callable:
        to, carries, terms, ins = _sum_operands(operands)
        by = np.uint64(int(terms[-1], 16))
        a, b = self._value(terms[0]), self._wide_term(terms[1], False)
        high = self._value(terms[2]) if "HI" in mods and "SX32" not in mods else None
        flags = [self._flag(p) for p in ins] if "X" in mods else []

        def run(m: Machine, mask: np.ndarray) -> None:
            if "HI" not in mods:
                shifted = (a() << by.astype(np.uint32)).astype(np.uint64)
            elif high is None:
                whole = a().view(np.int32).astype(np.int64).view(np.uint64)
                shifted = whole << by >> np.uint64(32)
            else:
                shifted = (a() | (high().astype(np.uint64) << np.uint64(32))) << by
                shifted = shifted >> np.uint64(32)
            total = shifted + b()
            for flag in flags:
                total = total + flag()
            m.write(to, total.astype(np.uint32), mask)
            for p in carries:
                m.write_predicate(p, total >> np.uint64(32) > 0, mask)

        return run

    def _sel(self, mods: list[str], operands: list[str]) -> Callable:
        to, flag = _register(operands[0]), self._flag(operands[3])
        a, b = self._value(operands[1]), self._value(operands[2])
        return lambda m, mask: m.write(to, np.where(flag(), a(), b()), mask)

    def _imnmx(self, mods: list[str], operands: list[str]) -> Callable:
        to, flag = _register(operands[0]), self._flag(operands[3])
        a, b = self._value(operands[1]), self._value(operands[2])
        kind = np.uint32 if "U32" in mods else np.int32

        def run(m: Machine, mask: np.ndarray) -> None:
            x, y = a().view(kind), b().view(kind)
            value = np.where(flag(), np.minimum(x, y), np.maximum(x, y))
            m.write(to, value.view(np.uint32), mask)

        return run

    def _iabs(self, mods: list[str], operands: list[str]) -> Callable:
        to, a = _register(operands[0]), self._value(operands[1])
        return lambda m, mask: m.write(to, np.abs(a().view(np.int32)).view(np.uint32), mask)

    def _prmt(self, mods: list[str], operands: list[str]) -> Callable:
        to = _register(operands[0])
        a, s, c = (self._value(o) for o in operands[1:4])

        def run(m: Machine, mask: np.ndarray) -> None:
            both, chosen = a() | (c().astype(np.uint64) << np.uint64(32)), s().astype(np.uint64)
            value = np.zeros(m.threads, np.uint64)
            for i in range(4):
                nibble = chosen >> np.uint64(4 * i) & np.uint64(15)
                byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
                sign = np.where(byte >> np.uint64(7) != 0, np.uint64(255), np.uint64(0))
                byte = np.where(nibble & np.uint64(8) != 0, sign, byte)
                value |= byte << np.uint64(8 * i)
            m.write(to, value.astype(np.uint32), mask)

        return run

    def _r2p(self, mods: list[str], operands: list[str]) -> Callable:
        a, chosen = self._value(operands[1]), int(operands[2], 16)

        def run(m: Machine, mask: np.ndarray) -> None:
            bits = a()
            for i in range(7):
                if chosen >> i & 1:
                    m.write_predicate(i, bits >> np.uint32(i) & np.uint32(1) != 0, mask)

        return run

    def _p2r(self, mods: list[str], operands: list[str]) -> Callable:
        to, chosen = _register(operands[0]), int(operands[3], 16)

        def run(m: Machine, mask: np.ndarray) -> None:
            bits = sum(m.predicates[i].astype(np.uint32) << np.uint32(i) for i in range(7))
            m.write(to, bits & np.uint32(chosen), mask)

        return run


def _extended(value: np.ndarray, kind: type) -> np.ndarray:
    return value.astype(np.uint64) if kind is np.uint64 else value.view(np.int32).astype(np.int64)


def _logic(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray, ones: np.generic) -> np.ndarray:
    """The function of three bits whose truth table is `table`, index a * 4 + b * 2 + c."""
    result = a & ~a
    for i in range(8):
        if table >> i & 1:
            parts = zip((a, b, c), (i >> 2, i >> 1, i), strict=True)
            term = ones
            for value, bit in parts:
                term = term & (value if bit & 1 else ~value)
            result = result | term
    return result


def _register(text: str) -> int:
    return 255 if text == "RZ" else int(text.lstrip("R").split(".")[0])


def _predicate(text: str) -> int:
    return 7 if text == "PT" else int(text[1:])


def _sum_operands(operands: list[str]) -> tuple[int, list[int], list[str], list[str]]:
    """(destination, predicates that take carries, terms, predicates that bring them)."""
    to, rest = _register(operands[0]), operands[1:]
    is_flag = re.compile(r"!?P[\dT]$").match
    out = 0
    while is_flag(rest[out]):
        out += 1
    last = len(rest)
    while is_flag(rest[last - 1]):
        last -= 1
    return to, [_predicate(p) for p in rest[:out]], rest[out:last], rest[last:]
