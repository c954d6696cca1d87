"""Labels of pairs of tokens, for probes: against trees and flows written by hand, and what ast says."""
import ast
import sys

import numpy as np
import pytest

import data


TREES = {  # a node is a list of tokens and nodes
    "x = f'a{y}'": ["x", "=", "f'a{y}'" if sys.version_info < (3, 12) else ["f'", "a", "{", "y", "}", "'"]],
    "x = y + 1": ["x", "=", ["y", "+", "1"]],
    "f(a)(b, k=2)": [[["f", "(", "a", ")"], "(", "b", ",", ["k", "=", "2"], ")"]],
    "def f(a, b: int = 'é'):\n    return not a": [
        "def", "f", "(", "a", ",", ["b", ":", "int"], "=", "'é'", ")", ":", ["return", ["not", "a"]]],
    "if a < b:\n    c.d[0] += 1\nelse:\n    pass": [
        "if", ["a", "<", "b"], ":", [[["c", ".", "d"], "[", "0", "]"], "+=", "1"], "else", ":", "pass"]}


@pytest.mark.parametrize("code", TREES)
def test_distances_and_siblings_equal_a_search_in_the_tree(code):
    near, leaves = {0: []}, []

    def grow(parent, children):
        for child in children:
            near[node := len(near)] = [parent]
            near[parent].append(node)
            leaves.append((node, child, parent)) if isinstance(child, str) else grow(node, child)
    grow(0, TREES[code])
    function = data.relations(code)
    distances, siblings = ({(i, j): label for i, j, label in function.pairs[name]} for name in ("distance", "siblings"))
    assert [code[a:b] for a, b in function.spans] == [word for _, word, _ in leaves]
    for i, (start, _, parent) in enumerate(leaves):
        far, queue = {start: 0}, [start]
        for node in queue:
            queue += [n for n in near[node] if n not in far]
            far |= {n: far[node] + 1 for n in near[node] if n not in far}
        for j, (other, _, others_parent) in enumerate(leaves[i + 1:], i + 1):
            assert distances.get((i, j)) == (far[other] - 2 if far[other] <= 6 else None)
            assert siblings[i, j] == (parent == others_parent)


FLOWS = {  # x0>2: the first token x reaches the third token x
    "a = a + 1; return a": "a0>2 a1>3",
    "a += b; b.c += a; return a": "a0>1 a1>2 a1>3 b0>1 b0>2",
    "x: a = x; return x": "a0>1 x0>2",
    "\n for i in b:\n  a += i\n return a": "b0>1 i0>1 a0>1 a0>2 a1>2",
    "\n while a:\n  b = a\n  a = g(b)\n return a": "a0>1 a0>2 a0>4 a3>1 a3>2 a3>4 b1>2",
    "\n for y in a:\n  if y: a = 1; break\n  a = 2\n else: a = y\n return a": "a0>1 a2>5 a4>5 y0>1 y0>2",
    "\n for y in a:\n  if y: a = 1; continue\n  a = 2\n return a": "a0>1 a0>4 a2>4 a3>4 y0>1",
    "\n if b: a = 1\n elif a: return a\n else: a = 2\n return a": "b0>1 a0>2 a0>3 a1>5 a4>5",
    "\n if b: a = 1\n y = a if b else b\n return a": "b0>1 b0>2 b0>3 a0>2 a1>2 a0>3 a1>3",
    "\n try: a = 2\n except E: a\n else: return a\n finally: a\n a": "a0>2 a1>2 a1>3 a0>4 a1>4 a0>5 a1>5",
    "\n try: return a\n finally: a": "a0>1 a0>2",
    "\n try: a = 2\n finally: a\n a": "a0>2 a1>2 a1>3",
    "\n try: a = g(a)\n except E as a: return a\n return a": "a0>2 a1>5",
    "return [a for a in a if a]": "a0>3 a2>1 a2>4",
    "return {a: y for a in a for y in a}": "a0>3 a2>1 a2>4 y1>0",
    "\n def g(y, z=a): return a + y\n y = 1\n return g(y)": "a0>1 a0>2 y0>1 y2>3",
    "return lambda a=a, *y: a + y": "a0>2 a1>3 y0>1",
    "\n class A(b): c = b\n return A, c": "b0>1 b0>2",
    "\n with a as b, b as a: return a": "a0>1 b1>2 a2>3",
    "c = 1; import a, b.c, w as c; from d import b; return a, b, c": "",
    "del a; return a": "",
    "\n if (y := a) and y: a = y\n return a": "a0>1 y0>1 y0>2 a0>3 a2>3",
    "\n match a:\n  case [a, *b]: a = b\n  case {1: z, **a}: a\n return a": "a0>1 a3>6 a0>6",
    "\n match a:\n  case 1: a = 2\n  case _: a = 3\n return a": "a0>1 a2>4 a3>4"}


@pytest.mark.parametrize("code", FLOWS)
def test_data_flows_of_functions_written_by_hand(code):
    function = data.relations(f"def f(a, b): {code}")
    words = [function.code[begin:end] for begin, end in function.spans]
    found = {f"{words[i]}{words[:i].count(words[i])}>{words[:j].count(words[j])}"
             for i, j, label in function.pairs["data flow"] if label}
    assert found == {*FLOWS[code].split()}


def test_every_kind_of_node_is_visited(functions):
    """All names that are read, and only they, are uses, in real code and in what it lacks."""
    rare = """
async def f(a: A, /, b: B = 1, *c: C, d: D = e, **g: G) -> H:
    global h; nonlocal i
    async for j in k: await l; break
    async with m as n, o: yield p; yield from q; raise v from w
    match c1:
        case d1.e1 | None | -1 | j1(k1, l1=m1): del o1, p1[q1], r1.s1
        case {"": _, **f1} | [g1, *h1] if i1: continue
    {t1: u1, **v1}, {w1 async for w1 in x1 if y1}, {z1: a2 for z1 in b2}, (c2 for d2 in e2), {f2}, f'{g2!r:{h2}}'
    (i2 := j2), k2[l2:m2:n2], lambda o2=p2, *q2, r2=s2: t2 if not u2 else (v2 < w2 <= x2) and ...
@deco
class Y(z2, metaclass=a3): b3: c3 = d3; e3 += f3
"""
    kinds, skipped = set(), {"TryStar", "TypeAlias", "TemplateStr", "Interpolation"}  # of later versions
    for code in [rare, *(function["code"] for function in functions)]:
        tree, flow = ast.parse(code), data.DataFlow()
        flow.visit(tree)
        kinds |= {type(node) for node in ast.walk(tree)}
        names = [node.target if isinstance(node, ast.AugAssign) else node for node in ast.walk(tree)
                 if isinstance(node, ast.AugAssign) or isinstance(getattr(node, "ctx", None), ast.Load)]
        read, uses = ({(name.id, name.lineno, name.col_offset) for name in some if isinstance(name, ast.Name)}
                      for some in (names, flow.uses))
        assert read == uses
    known = {kind for base in (ast.stmt, ast.expr, ast.pattern) for kind in base.__subclasses__()}
    assert {kind.__name__ for kind in known - kinds} <= skipped


def test_pairs_are_balanced(programs):
    """So many of each label; place does not tell siblings from others, nor equality of names a data flow."""
    found = data.probe_functions([str(programs)], 100, lambda code: "[" in code, seed=1)
    assert not {f.code for f in found["train"]} & {f.code for f in found["test"]}
    for split, count in (("train", 100), ("test", 25)):
        assert all("[" in function.code for function in found[split])
        for name, labels in data.RELATIONS.items():
            pairs = [(f, *pair) for f in found[split] for pair in f.pairs[name]]
            assert np.bincount([pair[3] for pair in pairs]).tolist() == [count] * labels
            same = [f.code[slice(*f.spans[i])] == f.code[slice(*f.spans[j])] for f, i, j, label in pairs if not label]
            apart = [np.mean([j - i for _, i, j, label in pairs if label == wanted]) for wanted in (0, 1)]
            assert (name != "data flow" or np.mean(same) >= 0.5) and (name != "siblings" or abs(np.diff(apart)) < 0.5)
