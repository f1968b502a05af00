import copy

import pytest
import report_data

from matryoshka import portraits
from matryoshka.reading import Reading

REPORT = report_data.report(20)


def with_map(**changed: object) -> Reading:
    report = copy.deepcopy(REPORT)
    report["anatomy"]["map"].update(changed)
    return Reading(report)


@pytest.mark.parametrize("draw", [portraits.maps, portraits.layers, portraits.prefixes, portraits.training])
def test_there_are_no_figures_of_what_was_not_measured(draw):
    assert draw(Reading({})) == []
    assert portraits.embedding(Reading({})) is None


def test_both_maps_hold_the_same_documents_in_the_same_colours():
    before, after = (figure.spec["datasets"]["rows"] for figure in portraits.maps(Reading(REPORT)))
    assert [(row["id"], row["group"]) for row in before] == [(row["id"], row["group"]) for row in after]
    assert [[row["x"], row["y"]] for row in after] == REPORT["anatomy"]["map"]["after"]
    assert [row["place"] for row in before] == list(range(360))


def test_the_commonest_labels_have_a_colour_each_and_the_rest_and_none_share_one():
    labels = [f"label {number % 20}" if number < 200 else "common" if number < 340 else "" for number in range(360)]
    figure = portraits.maps(with_map(labels=labels))[0]
    groups = figure.spec["encoding"]["color"]["scale"]["domain"]
    assert (groups[0], groups[-1], len(groups)) == ("common", "other", 9)
    assert {row["group"] for row in figure.spec["datasets"]["rows"]} == set(groups)
    assert [row[1] for row in figure.table.rows] == labels  # in full
    assert "coloured by label" in figure.caption


def test_clusters_stand_in_for_labels_and_without_either_all_are_alike():
    clustered = portraits.maps(with_map(labels=None, clusters=[number % 3 for number in range(360)]))[0]
    assert {row["group"] for row in clustered.spec["datasets"]["rows"]} == {"cluster 1", "cluster 2", "cluster 3"}
    plain = portraits.maps(with_map(labels=None))[0]
    assert len({row["group"] for row in plain.spec["datasets"]["rows"]}) == 1


def test_a_layer_without_weights_has_no_bar_among_the_weights_and_one_among_what_moved():
    weights, moved = portraits.layers(Reading(REPORT))
    assert [row["layer"] for row in weights.spec["datasets"]["rows"]] == ["embeddings", "0", "1", "2", "3", "4", "5"]
    assert moved.spec["datasets"]["rows"][-1]["layer"] == "head"
    assert moved.table.rows[0][1] == pytest.approx(0)


def test_curves_are_drawn_of_what_was_logged_and_dev_at_each_dim_and_on_average():
    dev, loss, rate = portraits.training(Reading(REPORT))
    assert [figure.key for figure in (dev, loss, rate)] == ["dev", "loss", "learning-rate"]
    assert len(loss.table.rows) == 200
    assert {row["dims"] for row in dev.spec["datasets"]["rows"]} == {"mean of all", *(f"{dim} dims" for dim in report_data.DIMS)}
    (only,) = portraits.training(Reading({"training": {"curves": [{"step": 1, "loss": 2.0}]}}))
    assert only.key == "loss"


def test_the_time_of_embedding_is_shared_out_in_full():
    figure = portraits.embedding(Reading(REPORT))
    assert figure
    assert sum(row["share"] for row in figure.spec["datasets"]["rows"]) == pytest.approx(1)
    assert figure.caption == "16,373 documents and 3,912,447 tokens: 88% of the time went to 'compute'."


def test_what_was_not_timed_has_no_bar_and_a_document_without_a_place_no_point():
    figure = portraits.embedding(Reading({"embedding": {"seconds": {"read": None, "compute": 2.0}}}))
    assert figure
    assert figure.table.rows == [["compute", 2.0, 1.0]]
    assert portraits.embedding(Reading({"embedding": {"seconds": {"read": None}}})) is None
    shown = {"before": [[0.0, 1.0], None, [1.0, 1.0]], "after": [[1.0, 0.0], [2.0, 0.0], [None, 1.0]], "texts": ["only"]}
    maps = portraits.maps(Reading({"anatomy": {"map": shown}}))
    assert [len(own.table.rows) for own in maps] == [1, 1]
