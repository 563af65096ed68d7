"""What a recipe may have in SETTINGS. What would be ignored without a word is refused when the recipe is read."""

import pytest

from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Reads a recipe with these SETTINGS, in a working folder that holds a folder `photos`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()

    def read(settings, **options):
        path = tmp_path / "net.py"
        path.write_text(f"from pyro_bmrs import Settings\nSETTINGS = {settings}\ndef network(*_): ...\n")
        return Recipe.read(path, **options)

    return read


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{'epochs': 2, 'kl_weight': 50.0}", r"by 'default', a known name .*: got 'epochs', 'kl_weight'$"),
        ("{'default': {}, 'kl_weight': 50.0}", "got 'kl_weight'$"),
        ("{'network': {'units': 3}}", "got 'network'$"),
        ("{'defualt': {'epochs': 2}}", r"got 'defualt'; did you mean 'default'\?$"),
        ("{'default': {}, 'fashion_mnist': {}}", r"did you mean 'fashion-mnist'\?$"),
        ("{'default': {}, 'cifar': {}}", r"did you mean 'cifar10'\?$"),
        ("{'default': {}, 'foto': {}}", "a folder that is there: got 'foto'$"),
        ("{'': {}}", "got ''$"),
        ("{3: {}}", "got 3$"),
        ("{'default': Settings(epochs=2)}", "a dict for each data set, .*: got Settings for 'default'$"),
        ("{'default': {}, 'mnist': [('epochs', 2)]}", "got list for 'mnist'$"),
        ("{'default': {}, 'photos': 3}", "got int for 'photos'$"),
    ],
)
def test_a_table_of_settings_that_would_be_ignored_is_refused_when_read(recipe, settings, says):
    with pytest.raises(ValueError, match=says):
        recipe(settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            "{'default': {'epoch': 3}}",
            r"known names in SETTINGS.*got \['epoch'\] for 'default'; did you mean 'epochs'",
        ),
        ("{'default': {}, 'cifar10': {'learning-rate': 1.0}}", "for 'cifar10'; did you mean 'learning_rate'"),
        ("{'default': {}, 'photos': {'data': 'mnist'}}", r"got \['data'\] for 'photos'"),
        (
            "{'default': {}, 'mnist': {'epochs': 0}}",
            "SETTINGS for 'mnist': epochs must be greater than .*: got 0",
        ),
    ],
)
def test_a_mistake_in_the_settings_of_any_data_set_is_told(recipe, settings, says):
    with pytest.raises(ValueError, match=says):
        RunSettings.of(recipe(settings), "digits", {})


@pytest.mark.parametrize("key", ["photos", "./photos", "a/b.npz", "own.npz", "/data/faces"])
def test_paths_are_keys(recipe, key):
    read = recipe(f"{{'default': {{'epochs': 3}}, {key!r}: {{'epochs': 4}}}}")
    assert RunSettings.of(read, key, {}).epochs == 4
    assert RunSettings.of(read, "digits", {}).epochs == 3
    assert RunSettings.of(read, "other.npz", {}).epochs == 3


@pytest.mark.parametrize(
    ("key", "given"), [("photos", "photos/"), ("./photos", "photos"), ("own.npz", "./own.npz")]
)
def test_a_path_is_found_however_it_is_written(recipe, key, given):
    """As from the completion of names in a shell, which adds a slash."""
    read = recipe(f"{{'default': {{'epochs': 3}}, {key!r}: {{'epochs': 4}}}}")
    assert RunSettings.of(read, given, {}).epochs == 4


def test_a_known_name_is_no_folder_of_that_name(recipe):
    read = recipe("{'./mnist': {'epochs': 3}, 'mnist': {'epochs': 4}}")
    assert RunSettings.of(read, "mnist", {}).epochs == 4
    assert RunSettings.of(read, "./mnist", {}).epochs == 3


def test_a_runs_own_copy_is_read_where_its_folders_are_not(recipe, tmp_path, monkeypatch):
    recipe("{'default': {}, 'photos': {}}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Recipe.read(tmp_path / "net.py", "mine.py").name == "mine.py"
    with pytest.raises(ValueError, match="got 'photos'"):
        Recipe.read(tmp_path / "net.py")
