"""How methods look: the same in every picture, and each in its own way."""

from starmerge_models.study.palette import BASE_COLOUR, COLOURS, plot_styles


def test_a_known_method_looks_the_same_beside_any_others() -> None:
    alone = plot_styles(["star"])["star"]
    assert plot_styles(["x", "ties", "star:eta=20", "star", "auto"])["star"] == alone
    assert plot_styles(["star:eta=20", "auto"])["star:eta=20"] == alone
    assert plot_styles(["star:eta=20", "star"])["star:eta=20"] != alone


def test_labels_of_one_picture_can_be_told_apart() -> None:
    labels = ["star", "average", *(f"star:rank={rank}" for rank in range(46))]
    shown = plot_styles(labels)
    assert list(shown) == labels
    assert len({(look.colour, look.marker) for look in shown.values()}) == len(labels)
    few = plot_styles(["star", "auto", "mine", "theirs", "a", "b"]).values()
    assert len({look.colour for look in few}) == len(COLOURS)
    assert BASE_COLOUR not in COLOURS


def test_many_labels_repeat_looks_and_odd_ones_have_one() -> None:
    assert len(plot_styles(str(number) for number in range(200))) == 200
    assert plot_styles(["", "\udce4", "a b"]).keys() == {"", "\udce4", "a b"}
