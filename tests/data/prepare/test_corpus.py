"""The standard library as a corpus: the same files for the same names and seed."""

from nltrain.data.prepare import Document, choose_documents, stdlib_corpus


def test_the_standard_library_is_a_corpus() -> None:
    documents = choose_documents(stdlib_corpus(), 300_000, seed=1)
    assert len(documents) > 5 and sum(len(text.encode()) for _, text in documents) <= 300_000
    assert [name for name, _ in documents] == sorted(name for name, _ in documents)
    assert documents == list(stdlib_corpus(300_000, seed=1))
    assert documents != list(stdlib_corpus(300_000, seed=2))


def test_chosen_documents_keep_their_order_and_stay_within_the_limit() -> None:
    documents = [Document(f"name {n}", "é" * n) for n in range(40)]
    chosen = choose_documents(documents[::-1], 300, seed=0)
    assert chosen and sum(len(document.text.encode()) for document in chosen) <= 300
    assert chosen == [document for document in documents[::-1] if document in chosen]
    assert set(chosen) == set(choose_documents(documents, 300, seed=0)) != set(choose_documents(documents, 300, seed=1))
    assert choose_documents(documents, None, seed=0) == documents
