"""framework/registry.py: finding members, reading and writing their one spelling, and saying what is wrong."""

import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import KvtwinError
from framework.registry import Registry

KIND = """
from dataclasses import dataclass

class Shape:
    pass
"""

MEMBERS = {
    "point": """
        from dataclasses import dataclass
        from shapes_kind import Shape

        @dataclass(frozen=True)
        class Point(Shape):
            pass
        """,
    "box": """
        from dataclasses import dataclass
        from shapes_kind import Shape
        from shapes_members.point import Point  # another member's class is not this file's

        class Solid(Shape):
            pass

        @dataclass(frozen=True)
        class Box(Solid):
            width: object
            height: object = 2.0
            inner: object = None

            def __post_init__(self):
                if self.height == 0:
                    raise ZeroDivisionError("no height\\nat all")

        Alias = Box
        """,
    "broken": "import shapes_members.point\n1 / 0\n",
    "syntax": "def :\n",
    "absent": "import no_such_library\n",
    "empty": "from shapes_members.point import Point\n",
    "twins": """
        from shapes_kind import Shape
        class One(Shape): pass
        class Two(Shape): pass
        """,
    "_private": "raise RuntimeError",
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A registry over a package of its own, beside a folder member and files that are none."""
    root = tmp_path_factory.mktemp("shapes")
    package = root / "shapes_members"
    (package / "folder").mkdir(parents=True)
    (package / "folder" / "__init__.py").write_text(dedent(MEMBERS["point"]))
    (package / "not_a_package").mkdir()
    (package / "notes.txt").write_text("")
    (root / "shapes_kind.py").write_text(KIND)
    for name, text in MEMBERS.items():
        (package / f"{name}.py").write_text(dedent(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        yield Registry(kind="shape", package="shapes_members", base=__import__("shapes_kind").Shape)
    for name in [each for each in sys.modules if each.startswith("shapes_")]:
        del sys.modules[name]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A member's file outside every package; the current folder is elsewhere."""
    path = tmp_path / "my (odd) shape.py"
    path.write_text(dedent(MEMBERS["box"]).replace("class Box", "class Mine").replace("= Box", "= Mine"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return path


def test_names_are_the_files_and_nothing_is_imported(shapes):
    assert shapes.names() == ("absent", "box", "broken", "empty", "folder", "point", "syntax", "twins")
    assert "shapes_members.twins" not in sys.modules


def test_get_takes_the_leaf_class_that_the_file_defines(shapes):
    assert shapes.get("box").__name__ == "Box"
    assert shapes.get("box") is shapes.get("box")


def test_a_package_folder_is_a_member(shapes):
    assert shapes.get("folder").__module__ == "shapes_members.folder"


@pytest.mark.parametrize("text", ["point", "point()", " point ( ) "])
def test_a_bare_name_is_a_call_without_arguments(shapes, text):
    assert shapes.make(text) == shapes.get("point")()


def test_arguments_are_literals_and_members(shapes):
    box = shapes.make("box( width=-3, height=(1.5, 'a', None, point), inner=box(width=True, inner=point()))")
    point = shapes.get("point")()
    assert (box.width, box.height) == (-3, (1.5, "a", None, point))
    assert (box.inner.width, box.inner.inner) == (True, point)


def test_defaults_are_left_out_of_the_spelling_and_required_fields_never(shapes):
    box = shapes.get("box")
    assert shapes.spelling(shapes.get("point")()) == "point()"
    assert shapes.spelling(box(width=2)) == "box(width=2)"
    assert shapes.spelling(box(2, 2.0, box(None, 3))) == "box(width=2, inner=box(width=None, height=3))"
    assert shapes.spelling(box((1,), float("-inf"))) == "box(width=(1,), height=-1e999)"


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False).filter(bool),
    st.text(max_size=9),
    st.binary(max_size=5),
    st.tuples(st.integers(), st.text(max_size=3)),
    st.just(()),
)


@given(data=st.data())
def test_make_reads_back_every_spelling(shapes, data):
    box, point = shapes.get("box"), shapes.get("point")
    values = st.recursive(
        st.one_of(VALUES, st.builds(point)),
        lambda inner: st.one_of(st.builds(box, inner, st.just(2.0), inner), st.tuples(inner)),
        max_leaves=5,
    )
    made = data.draw(st.builds(box, values, VALUES.filter(lambda each: each != 0), values))
    assert shapes.make(shapes.spelling(made)) == made


def test_a_path_names_a_member_outside(shapes, outside):
    path_before = list(sys.path)
    mine = shapes.get(str(outside))
    assert mine.__name__ == "Mine"
    assert shapes.get(str(outside)) is shapes.get(f"../{outside.name}")
    assert sys.path == path_before
    made = mine(width=mine(width=1))
    assert shapes.make(shapes.spelling(made)) == made


def test_an_edited_file_is_a_new_class(shapes, outside):
    before = shapes.get(str(outside))
    outside.write_text(outside.read_text() + "\n")
    assert shapes.get(str(outside)) is not before


def test_a_path_below_the_current_folder_is_spelled_from_there(shapes, outside, monkeypatch):
    plain = outside.rename(outside.with_name("plain.py"))
    monkeypatch.chdir(plain.parent)
    assert shapes.spelling(shapes.make("plain.py(width=1)")) == "plain.py(width=1)"
    assert shapes.make("box(width='plain.py'(width=1))").width == shapes.make("./plain.py(width=1)")


def test_a_class_of_several_is_named_after_a_colon(shapes, outside):
    outside.write_text(dedent(MEMBERS["twins"]))
    two = shapes.get(f"{outside}:Two")
    assert two.__name__ == "Two"
    assert shapes.spelling(two()).endswith(":Two'()")


@pytest.mark.parametrize("name", ["shapes_members.box", "shapes_members.box:Box"])
def test_a_dotted_name_reaches_any_module(shapes, name):
    assert shapes.get(name) is shapes.get("box")
    assert shapes.make(f"{name}(width=1)") == shapes.make("box(width=1)")


def test_a_class_of_another_module_is_spelled_by_it(shapes):
    base = shapes.base

    @dataclass(frozen=True)
    class Local(base):
        pass

    assert shapes.spelling(Local()).endswith(
        "test_a_class_of_another_module_is_spelled_by_it.<locals>.Local()"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bax", ["no shape is called 'bax'", "near: box", "expected one of absent, box, "]),
        ("zzzzzz(width=1)", ["no shape is called 'zzzzzz'", "expected one of"]),
        ("box(wdith=1)", ["box has no field 'wdith'", "near: width", "expected one of height, inner, width"]),
        ("point(width=1)", ["point has no field 'width'", "none"]),
        ("box()", ["box needs width"]),
        ("box(1)", ["argument without a name", "box(field=value"]),
        ("box(**{'width': 1})", ["argument without a name"]),
        ("box(width=1, width=2)", ["one argument twice"]),
        ("box(width=1, height=0)", ["cannot be made: ZeroDivisionError: no height"]),
        ("box(width=1", ["does not spell a shape", "name(field=value, ...)"]),
        ("box(width=1) + 1", ["does not spell a shape"]),
        ("box(width=1)(width=1)", ["does not spell a shape"]),
        ("box(width=\0)", ["does not spell a shape"]),
        ("", ["'' does not spell a shape"]),
        ("(width=1)", ["does not spell a shape"]),
        ("box(width=1 + two)", ["which is not a value", "string in quotes"]),
        ("box(width=exact)", ["holds exact, which is not a value", "string in quotes"]),
        ("box(width=[i for i in (1, 2)])", ["which is not a value"]),
        ("box(width=open('/etc/passwd'))", ["argument without a name"]),
        (
            "broken",
            [
                "broken' does not import as a shape",
                "broken.py, line 2",
                "ZeroDivisionError: division by zero",
            ],
        ),
        ("syntax", ["syntax.py, line 1", "SyntaxError: invalid syntax"]),
        ("absent", ["absent' does not import", "ModuleNotFoundError: No module named 'no_such_library'"]),
        ("empty", ["'empty' defines no shape", "shapes_kind.Shape"]),
        ("twins", ["'twins' defines 2 shape classes: One, Two"]),
        ("twins.three", ["no module is called 'twins'", "path"]),
        ("shapes_members.none_such", ["no module is called 'shapes_members.none_such'"]),
        ("shapes_members.twins:Thre", ["holds no shape called 'Thre'", "found: One, Two"]),
        ("shapes_members.a-b", ["is not the name of a module"]),
        ("nowhere/mine.py(width=1)", ["no Python file is at 'nowhere/mine.py'"]),
        ("./mine", ["no Python file is at './mine'", "ending in .py"]),
    ],
)
def test_what_is_wrong_is_said_in_three_lines(shapes, text, words):
    with pytest.raises(KvtwinError) as caught:
        shapes.make(text)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    for word in words:
        assert word in message


def test_a_file_that_failed_is_not_left_half_loaded(shapes, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(KvtwinError, match="mine.py, line 1"):
        shapes.get(str(path))
    assert set(sys.modules) == before


def test_a_file_that_exits_is_an_error_and_no_exit(shapes, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import sys\nsys.exit('bye')\n")
    with pytest.raises(KvtwinError, match="SystemExit: bye"):
        shapes.get(str(path))


def test_an_unfinished_class_names_what_it_lacks(shapes, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from abc import ABC, abstractmethod\nfrom shapes_kind import Shape\nclass Mine(Shape, ABC):\n"
        "    @abstractmethod\n    def area(self): ...\n"
    )
    with pytest.raises(KvtwinError, match="does not define area"):
        shapes.make(str(path))


def test_the_bundled_policies_are_all_found():
    from framework.policy import policies

    folder = Path(__file__).parents[2] / "framework" / "policies"
    expected = tuple(sorted(each.stem for each in folder.glob("*.py") if not each.stem.startswith("_")))
    assert policies.names() == expected
    for name in expected:
        for example in policies.get(name).examples():
            assert policies.make(policies.spelling(example)) == example
