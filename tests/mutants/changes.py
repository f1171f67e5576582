"""Mutants of a source text: one small change each, made in its syntax tree."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
SKIPPED = ("annotation", "returns", "decorator_list", "bases", "type_params")
SKIPPED_CALLS = {"Field", "warning", "info", "debug", "getLogger"}  # their texts are for people
SYMMETRIC = {"max", "min", "torch.equal", "math.gcd"}
REMOVABLE = (ast.Expr, ast.AugAssign, ast.Raise)


@dataclass(frozen=True)
class Mutant:
    """Line, change and text of a mutated file."""

    line: int
    change: str
    text: str


def mutants_of(source: str) -> list[Mutant]:
    """Return all mutants of a source text in the order of its syntax tree."""
    tree = ast.parse(source)
    found = []
    for owner, field, old, new in _changes(tree):
        _replace(owner, field, old, new)
        removed = isinstance(new, ast.Pass)
        change = f"delete {_short(old)}" if removed else f"{_short(old)} -> {_short(new)}"
        found.append(Mutant(old.lineno, change, ast.unparse(ast.fix_missing_locations(tree))))
        _replace(owner, field, new, old)
    return found


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, ast.AST, ast.AST]]:
    """Yield (owner, field, old node, new node) for each change below a node."""
    for field, value in ast.iter_fields(node):
        if field in SKIPPED or isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_text_for_people(child):
                continue
            for new in _variants(child):
                yield node, field, child, new
            if not isinstance(child, ast.Raise):
                yield from _changes(child)


def _is_text_for_people(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or _is_text_for_people(node.value)
    function = node.func if isinstance(node, ast.Call) else None
    return isinstance(function, ast.Name | ast.Attribute) and ast.unparse(function).split(".")[-1] in SKIPPED_CALLS


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the changed forms of one node."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            yield ast.Compare(node.left, [COMPARISONS[type(operator)]()], node.comparators)
        case ast.BinOp() if type(node.op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.5)
        case ast.Constant(value=str()) if node.value:
            yield ast.Constant(node.value + "x")
        case ast.IfExp():
            yield ast.IfExp(node.test, node.orelse, node.body)
        case ast.If() | ast.While() if not node.orelse:
            yield type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, [])
        case ast.Return(value=ast.AST()) if not _is_none(node.value):
            yield ast.Return(ast.Constant(None))
        case ast.Call():
            for keyword in node.keywords:
                yield ast.Call(node.func, node.args, [other for other in node.keywords if other is not keyword])
            if len(node.args) > 1 and ast.unparse(node.func) not in SYMMETRIC:
                yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
    if isinstance(node, REMOVABLE):
        yield ast.Pass()


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _replace(owner: ast.AST, field: str, old: ast.AST, new: ast.AST) -> None:
    value = getattr(owner, field)
    setattr(owner, field, [new if item is old else item for item in value] if isinstance(value, list) else new)


def _short(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:90]
