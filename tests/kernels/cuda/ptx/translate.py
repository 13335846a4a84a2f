"""From PTX to C++: each kernel becomes a function, each register a variable, each instruction a call.

What calls do is instructions.h's. Nothing is guessed: what this file does not know is an error, and what instructions.h
does not know does not compile.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass


class TranslationError(Exception):
    """The PTX holds something that is not translated; the message names it."""


ENTRY = re.compile(
    r"\.visible \.entry (\w+)\(\s*\.param \.align 8 \.b8 (\w+)\[(\d+)\]\s*\)[^{;]*\{(.*?)\n\}", re.DOTALL
)
DECLARATION = re.compile(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;")
LABEL = re.compile(r"\$(\w+):")
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*?);")
IGNORED = (".pragma", ".loc", "//")
SHARED_ARRAY = "bytes"

REGISTER = re.compile(r"%([a-z]+)(\d+)")
FLOAT = re.compile(r"0f([0-9A-F]{8})")
INTEGER = re.compile(r"(-?(?:0x[0-9A-Fa-f]+|\d+))U?")
ADDRESS = re.compile(r"\[(%?\w+)(?:\+(-?\d+))?\]")
SPECIAL = {"%tid.x": "thread_index()", "%ctaid.x": "block_index(0)", "%ctaid.y": "block_index(1)"}
BITS = {"b32": 32, "b64": 64}
# Names that C++ keeps for itself.
RESERVED = {"and", "or", "xor", "not"}

# Operands' types where they are not all the instruction's own, T.
OPERANDS = {
    "shl": ("T", "u32"),
    "shr": ("T", "u32"),
    "bfi": ("T", "T", "u32", "u32"),
    "lop3": ("T", "T", "T", "u32"),
    "prmt": ("T", "T", "u32"),
    "selp": ("T", "T", "pred"),
}
TOGETHER = frozenset({"bar", "shfl", "vote", "atom", "membar", "cp", "ldmatrix", "mma"})
MMA = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "BFloat16",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "Float16",
}
LDMATRIX = {
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": "false",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": "true",
}


def translate(ptx: str) -> str:
    """C++ with a function for each kernel of `ptx`, under the kernel's own (mangled) name."""
    kernels = [Kernel(*match.groups(), ptx.count("\n", 0, match.start(4)) + 1) for match in ENTRY.finditer(ptx)]
    if len(kernels) != ptx.count(".entry"):
        raise TranslationError("a kernel does not take one structure of parameters")
    return '#include "instructions.h"\n\nusing namespace ptx;\n' + "".join(kernel.translate() for kernel in kernels)


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: str
    parameter_bytes: str
    body: str
    first_line: int

    def translate(self) -> str:
        numbered = enumerate(self.body.splitlines(), self.first_line)
        lines = [text for number, line in numbered for text in self._line(" ".join(line.split()), number)]
        head = f'extern "C" void {self.name}(Parameters<{self.parameter_bytes}> parameters)'
        return "\n".join(["", f"{head} {{", *(f"  {line}" for line in lines), "}", ""])

    def _line(self, line: str, number: int) -> Iterator[str]:
        if not line or line.startswith(IGNORED):
            return
        if line in "{}":
            yield line
        elif declared := DECLARATION.fullmatch(line):
            kind, prefix, count = declared.groups()
            for i in range(int(count)):
                yield f"[[maybe_unused]] {kind} {prefix}_{i} = unset<{kind}>();"
        elif label := LABEL.fullmatch(line):
            yield f"{label[1]}:;"
        elif instruction := INSTRUCTION.fullmatch(line):
            negation, guard, opcode, operands = instruction.groups()
            condition = f"if ({negation}{_variable(guard)}) " if guard else ""
            where = f'"{line} (line {number})"'
            yield f"{condition}{{ {self._instruction(opcode, _split(operands), where)} }}"
        else:
            raise TranslationError(f"not understood: {line}")

    def _instruction(self, opcode: str, operands: list[str], where: str) -> str:
        """where: its text and line, as C++ writes them."""
        family, *parts = opcode.split(".")
        if family == "mov" or opcode == "cvta.to.global.u64":
            return self._move(parts[-1], *operands)
        if family in ("ld", "st"):
            return self._access(family, parts, operands, where)
        if family == "bra":
            return f"goto {operands[0].removeprefix('$')};"
        if family == "ret":
            return "return;"
        if family in TOGETHER or not operands:
            return self._together(opcode, operands, where)
        return self._compute(opcode, operands)

    def _compute(self, opcode: str, operands: list[str]) -> str:
        """A call of the instruction's function, which the compiler misses if there is none."""
        name, _, kind = opcode.rpartition(".")
        family, types = opcode.split(".")[0], kind
        kinds = OPERANDS.get(family, ("T",) * (len(operands) - 1))
        if family == "cvt":
            name, _, to = name.rpartition(".")
            types = f"{to}, {kind}"
        values = [self._read(one, kind if as_ == "T" else as_) for one, as_ in zip(operands[1:], kinds, strict=True)]
        return _write(operands[0], f"{_identifier(name)}<{types}>({', '.join(values)})")

    def _move(self, kind: str, to: str, value: str) -> str:
        """Also of halves into a register, and of a register into halves."""
        if not (to + value).count("{"):
            return _write(to, self._read(value, kind))
        halves = _elements(to if to.startswith("{") else value)
        if len(halves) != 2 or kind not in BITS:
            raise TranslationError(f"not in halves: {to}, {value}")
        half = BITS[kind] // 2
        if to.startswith("{"):
            whole = self._read(value, kind)
            return " ".join(_write(one, f"static_cast<b{half}>({whole} >> {i * half})") for i, one in enumerate(halves))
        low, high = (f"static_cast<{kind}>({self._read(one, f'b{half}')})" for one in halves)
        return _write(to, f"{low} | {high} << {half}")

    def _access(self, family: str, parts: list[str], operands: list[str], where: str) -> str:
        space, kind = parts[0], parts[-1]
        if parts[1:-1] not in ([], ["v2"], ["v4"]) or space not in ("global", "shared", "param"):
            raise TranslationError(f"memory is reached in an unknown way: {where}")
        count = int(parts[1][1]) if len(parts) == 3 else 1
        memory, register = operands if family == "st" else reversed(operands)
        registers = _elements(register)
        if len(registers) != count:
            raise TranslationError(f"not {count} registers: {where}")
        size = f"{count} * sizeof({kind})"
        address = self._address(memory)
        places = [f"at + {i} * sizeof({kind})" for i in range(count)]
        if family == "st":
            moved = " ".join(
                f"store({at}, {self._read(one, kind)});" for at, one in zip(places, registers, strict=True)
            )
        else:
            moved = " ".join(_write(one, f"load<{kind}>({at})") for at, one in zip(places, registers, strict=True))
        if space == "param":
            return f"const char* at = reinterpret_cast<const char*>({address}); {moved}"
        if space == "shared":
            return f"char* at = shared({address}, {size}, {where}); {moved}"
        reached = f"{'load' if family == 'ld' else 'store'}_global(at, {address}, {size}, {where});"
        return f"char at[{size}]; " + (f"{reached} {moved}" if family == "ld" else f"{moved} {reached}")

    def _together(self, opcode: str, operands: list[str], where: str) -> str:
        """What threads do together, and what has no result."""
        if opcode == "bar.sync" and operands == ["0"]:
            return f"bar_sync({where});"
        if opcode == "bar.warp.sync":
            return f"bar_warp_sync({self._read(operands[0], 'u32')}, {where});"
        if opcode in ("shfl.sync.bfly.b32", "shfl.sync.idx.b32"):
            to, *is_in_range = operands[0].split("|")
            values = ", ".join(self._read(one, "u32") for one in operands[1:])
            shuffle = _write(to, f"{_identifier(opcode.removesuffix('.b32'))}({values}, {where})")
            return " ".join([shuffle, *(_write(one, "true") for one in is_in_range)])
        if opcode == "vote.sync.any.pred":
            to, value, lanes = operands
            return _write(to, f"vote_sync_any({self._read(value, 'pred')}, {self._read(lanes, 'u32')}, {where})")
        if opcode == "atom.global.add.u32":
            to, memory, value = operands
            return _write(to, f"atom_add({self._address(memory)}, {self._read(value, 'u32')}, {where})")
        if opcode == "membar.gl":
            return "membar_gl();"
        if opcode in ("cp.async.cg.shared.global", "cp.async.cg.shared.global.L2::128B"):
            to, memory, width, size = operands
            if width != "16":
                raise TranslationError(f"not 16 bytes: {where}")
            addresses = f"{self._address(to)}, {self._address(memory)}"
            return f"cp_async_16({addresses}, {self._read(size, 'u32')}, {where});"
        if opcode == "cp.async.commit_group":
            return "cp_async_commit_group();"
        if opcode == "cp.async.wait_group":
            return f"cp_async_wait_group({operands[0]});"
        if opcode in LDMATRIX:
            writes = " ".join(_write(one, f"loaded[{i}]") for i, one in enumerate(_elements(operands[0])))
            call = f"ldmatrix<{LDMATRIX[opcode]}>(loaded, {self._address(operands[1])}, {where});"
            return f"u32 loaded[4]; {call} {writes}"
        if opcode in MMA:
            sums, rows, columns, before = (_elements(one) for one in operands)
            c, a, b = (
                ", ".join(self._read(one, kind) for one in ones)
                for ones, kind in ((before, "f32"), (rows, "u32"), (columns, "u32"))
            )
            writes = " ".join(_write(one, f"c[{i}]") for i, one in enumerate(sums))
            call = f"mma<{MMA[opcode]}>(c, a, b, {where});"
            return f"f32 c[4] = {{{c}}}; const u32 a[4] = {{{a}}}; const u32 b[2] = {{{b}}}; {call} {writes}"
        raise TranslationError(f"unknown instruction: {where}")

    def _read(self, operand: str, kind: str) -> str:
        """An operand's value as `kind`."""
        if REGISTER.fullmatch(operand):
            return f"as<{kind}>({_variable(operand)})"
        if operand in SPECIAL:
            return f"as<{kind}>({SPECIAL[operand]})"
        if bits := FLOAT.fullmatch(operand):
            return f"as<{kind}>(u32(0x{bits[1]}))"
        if number := INTEGER.fullmatch(operand):
            return f"static_cast<{kind}>({number[1]}ll)"
        if operand == SHARED_ARRAY:
            return f"as<{kind}>(kSharedBase)"
        if operand == self.parameters:
            return f"as<{kind}>(reinterpret_cast<u64>(parameters.bytes))"
        raise TranslationError(f"unknown operand: {operand}")

    def _address(self, operand: str) -> str:
        """Of "[name+distance]"; as wide as what it is made from, so that it wraps as that does."""
        match = ADDRESS.fullmatch(operand)
        if match is None:
            raise TranslationError(f"unknown address: {operand}")
        base, distance = match.groups()
        kind = "u32" if base == SHARED_ARRAY or re.fullmatch(r"%r\d+", base) else "u64"
        return f"{self._read(base, kind)} + {kind}({distance or 0}ll)"


def _split(operands: str) -> list[str]:
    """At commas outside braces."""
    return [one.strip() for one in re.split(r",(?![^{]*\})", operands)] if operands else []


def _elements(operand: str) -> list[str]:
    """Of a vector in braces; of anything else, itself."""
    return [one.strip() for one in operand.strip("{}").split(",")]


def _write(register: str, value: str) -> str:
    return f"set({_variable(register)}, {value});"


def _variable(register: str) -> str:
    """No name of a type: %f32 is f_32."""
    match = REGISTER.fullmatch(register)
    if match is None:
        raise TranslationError(f"not a register: {register}")
    return "_".join(match.groups())


def _identifier(name: str) -> str:
    return name + "_" if name in RESERVED else name.replace(".", "_")
