"""The data sets of ViP-LLaVA's own training, as its authors published them in one JSON list (vip-llava_stage2_mix.json).

A record is known by how its "id" begins. Those of Visual Genome and RefCOCOg that GPT-4V wrote are conversations; for the others a reader
here makes one. It gives the turns, with <bbox0>, <bbox1> … for the regions, and of each region the things in it: (box, polygons of the
outline, or None). The authors vary the wording of the open questions; here each data set has one.
"""

import json
import re

from marks import KINDS

LETTERS = "ABCD"
LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
POINTQA = "pointQA_twice"


def only(*kinds):
    return {kind: KINDS[kind] for kind in kinds}


THIN = {"rectangle": KINDS["rectangle"]._replace(widths=(3, 3))}
SHOWN = {  # with which kinds of marks the authors show each data set
    "refcocog": KINDS,
    "vcr": only("rectangle", "ellipse", "triangle", "scribble", "mask contour", "mask", "arrow"),
    "vg_rel": only("rectangle", "ellipse"),
    "flickr30k": only("rectangle", "ellipse", "arrow"),
    "v7w": THIN,
    POINTQA: THIN,
}


def dataset_of(record):
    """The authors' data set that a record is of, or None."""
    name = str(record.get("id")).partition("-")[0]
    return name if name in SHOWN else None


def read_refcocog(record, images, random):
    question = "Describe the object <bbox0> in a short phrase."
    return said(question, record["answer"]), [[(record["bboxes"][0], record["segmentations"][0])]]


def read_vg_rel(record, images, random):
    """Visual Genome: how two things are related."""
    question = "How is the object <bbox0> related to the object <bbox1>? Give a short triplet: (subject, relationship, object)."
    return said(question, record["answer"]), boxes_alone(record["bboxes"])


def read_flickr30k(record, images, random):
    """Flickr30k Entities: a caption with <bbox0> behind its phrases, each with one or several boxes. Half of the answers leave the
    marks out."""
    question, caption = "Describe the picture and what is marked in it.", record["grounding"].strip()
    if random.random() < 0.5:
        caption = re.sub(r" ?<bbox\d+>", "", caption)
    else:
        question += " Say how each thing is marked."
    return said(question, capital(caption.rstrip(" .")) + "."), [[(box, None) for box in boxes] for boxes in record["bbox"]]


def read_v7w(record, images, random):
    """Visual7W: which of four boxes it is, asked as in the benchmark."""
    boxes = record["bboxes"]
    options = [f"{letter}. The object <bbox{n}>" for n, letter in enumerate(LETTERS)]
    question = "\n".join([record["question"], *options, LETTER])
    return said(question, LETTERS[boxes.index(record["answer"])]), boxes_alone(boxes)


def read_pointqa(record, images, random):
    """PointQA-LookTwice: about all that is like the thing in the one box, asked as in the benchmark."""
    question = f"{record['general_question']} The exemplary object is within the rectangle.\n{WORD}"
    return said(question, record["answer"]), boxes_alone(record["bboxes"][:1])


def read_vcr(record, images, random):
    """VCR: a question about persons and things, and why the answer is right. A sentence is a list of words, with a list of numbers where
    things are meant. A file beside the picture holds the boxes and the outlines of all things."""
    scene = json.loads((images / record["meta_dir"].removeprefix("./dataset/")).read_text(encoding="utf-8"))
    mentioned = {}  # the number of a thing: its place among those that the text mentions

    def sentence(parts):
        words = []
        for part in parts:
            if isinstance(part, list):
                places = [mentioned.setdefault(n, len(mentioned)) for n in part]
                names = [random.choice(("object", record["class_names"][n])) for n in part]
                part = " and ".join(f"the {name} <bbox{place}>" for name, place in zip(names, places))
            words.append(part)
        return capital(re.sub(r" (?=[.,?!:;'])", "", " ".join(words)))

    def ask(question, options, right):
        """Question and answer. Half of the questions are open, half give four options."""
        if random.random() < 0.5:
            return question, sentence(options[right])
        lines = [f"{letter}. {sentence(option)}" for letter, option in zip(LETTERS, options)]
        return "\n".join([question, *lines, LETTER]), LETTERS[right]

    what = ask(sentence(record["question"]), record["answer_choices"], record["answer_label"])
    why = ask("Why?", record["rationale_choices"], record["rationale_label"])
    regions = []
    for n in mentioned:
        polygons = [[number for point in polygon for number in point] for polygon in scene["segms"][n]]
        regions.append([(scene["boxes"][n][:4], polygons)])  # the fifth number is how sure the detector was
    return said(*what, *why), regions


def said(question, *more):
    """The turns of a conversation about a picture: question, answer, question …"""
    values = (f"<image>\n{question}", *more)
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def capital(sentence):
    return sentence[:1].upper() + sentence[1:]


def boxes_alone(boxes):
    """Regions of one thing each, of which only the box is known."""
    return [[(box, None)] for box in boxes]


READERS = {
    "refcocog": read_refcocog,
    "vcr": read_vcr,
    "vg_rel": read_vg_rel,
    "flickr30k": read_flickr30k,
    "v7w": read_v7w,
    POINTQA: read_pointqa,
}
