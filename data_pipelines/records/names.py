"""The names under which public data sets store a sample's images, text and speakers, in lower case and by priority.

Names are compared case-insensitively.
"""

from __future__ import annotations

import re

# Fields that hold images whatever their value looks like: paths, URLs, data URIs, bytes, structs, lists of these.
IMAGE_FIELDS = (
    *("image", "images", "jpg", "jpeg", "png", "webp", "image_bytes", "image_path", "image_paths", "img", "imgs"),
    *("img_path", "img_paths", "image_file", "image_files", "image_name", "image_url", "image_urls", "img_url"),
    *("image_base64", "image_b64", "img_base64", "img_b64", "image_data", "img_bytes", "img_file", "img_name"),
    *("image_filename", "image_file_name", "image_list", "pic", "pics", "picture", "pictures", "photo", "photos"),
    *(
        "image/encoded",
        "image/data",
        "image_raw",
        "pixel_values",
        "screenshot",
        "image_filepath",
        "image_local_path",
        "local_image_path",
        "decoded_image",
    ),
)
# Other spellings of such names: imagePath, img_file_path, photo_url ...
IMAGE_FIELD = re.compile(
    r"(?:image|img|pic|picture|photo|screenshot)s?[_ ./-]?"
    r"(?:(?:local[_-]?)?paths?|(?:file[_-]?)?(?:names?|paths?)|files?|ur[li]s?|src|links?|bytes|binary|base64|b64|data|list|raw)?"
)
NUMBERED_IMAGE = re.compile(r"(?:image|img|picture)_?(\d{1,2})")  # image_1, image_2 ...: as many as are filled
# Fields that hold an image if their value ends like the name of one.
FILE_FIELDS = ("file_name", "filename", "file", "file_path", "filepath", "path", "image/filename", "image_id")
_FILES = "(?:_?(?:path|paths|file|files|url|name|bytes))?"
VIDEO_FIELD = re.compile(rf"(?:video|videos|video_clip|mp4|webm|mkv|avi){_FILES}")
AUDIO_FIELD = re.compile(rf"(?:audio|audios|audio_clip|speech|wav|mp3|flac|ogg|m4a){_FILES}")
DOCUMENT_FIELD = re.compile(rf"(?:pdf|pdfs|document|documents|doc){_FILES}")  # if its value is the name of one

# Bounded, as are all repetitions that could meet the same text again from each place at which a match may begin.
_QUERY = r"(?:[?#]\S{0,4000}+)?$"
IMAGE_NAME = re.compile(
    r"\.(?:jpe?g|jpe|jfif|png|apng|gif|webp|avif|bmp|tiff?|heic|heif|jxl|jp2|j2k|ico|tga|ppm|svg)" + _QUERY, re.I
)
VIDEO_NAME = re.compile(r"\.(?:mp4|m4v|mov|avi|mkv|webm|flv|wmv|mpe?g|3gp|ogv)" + _QUERY, re.I)
AUDIO_NAME = re.compile(r"\.(?:wav|mp3|flac|ogg|opus|m4a|aac|wma)" + _QUERY, re.I)
DOCUMENT_NAME = re.compile(r"\.(?:pdf|djvu|docx?|pptx?|xlsx?)" + _QUERY, re.I)

CONVERSATION_FIELDS = (
    *("conversations", "messages", "conversation", "dialog", "dialogue", "dialogs", "dialogues", "chat", "turns"),
    *("qa_pairs", "qas", "qa", "texts", "contents"),
)
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
ROLE_FIELDS = ("from", "role", "speaker", "author", "sender")
TEXT_FIELDS = ("value", "content", "text", "message", "utterance", "parts")
ROLES = {
    **dict.fromkeys(["human", "user", "usr", "question", "questioner", "prompter", "customer", "instruction"], "human"),
    **dict.fromkeys(["prompt", "query", "q", "person", "input", "client", "patient", "用户", "人类", "问"], "human"),
    **dict.fromkeys(["gpt", "assistant", "chatgpt", "gpt4", "gpt-4", "gpt4v", "gpt-4v", "gpt-4o"], "gpt"),
    **dict.fromkeys(
        ["bing", "bard", "model", "bot", "chatbot", "ai", "llm", "vlm", "claude", "gemini", "llama", "agent"], "gpt"
    ),
    **dict.fromkeys(["answer", "answerer", "response", "output", "a", "machine", "doctor", "助手", "答"], "gpt"),
    **dict.fromkeys(["system", "sys", "developer", "system_prompt", "系统"], "system"),
}
# Prefixes of model names that some sets give as the speaker: "gpt-3.5-turbo", "qwen2-vl", "assistant_gpt4v".
MODEL = re.compile(
    r"(?:(?:chat)?gpt|assistant|ai|bot|chatbot|claude|gemini|gemma|llama|llava|vicuna|qwen|intern(?:vl|lm)|mistral|mixtral"
    r"|pixtral|deepseek|phi|grok|minicpm|cogvlm|(?:chat)?glm|molmo|aria)(?![a-z])"
)

CAPTION_FIELDS = (
    *("caption", "captions", "re_caption", "recaption", "text", "sentence", "sentences", "description"),
    *("descriptions", "alt_text", "alt", "image_caption", "image_description", "long_caption", "short_caption"),
    *("detailed_caption", "raw_caption", "image/caption", "image/text", "caption/text", "title", "txt", "comment"),
)
QUESTION_FIELDS = ("question", "query", "instruction", "prompt", "problem", "user", "human")
ANSWER_FIELDS = (
    *("answer", "multiple_choice_answer", "answers", "response", "output", "completion", "label", "solution"),
    *("assistant", "gpt", "target"),
)
HINT_FIELDS = ("hint", "context")
CHOICE_FIELDS = ("choices", "options")
HISTORY_FIELD = "history"  # the turns before a question and its answer
ID_FIELDS = ("id", "question_id", "uid", "sample_id", "key", "__key__", "image_id", "index")

# Fields that say which image or video a row is about if the row does not include it.
MEDIA_ID = re.compile(
    r"(?:\w+_)?(?:(image|img|photo|picture|figure)|video|vid|youtube|yt)_?(?:id|ids|idx|key|hash|sha256)", re.I
)
# Marks of an image's place: "<image 1>", "<image-1>", "<image_1>", "<image1>", "<image:1>".
NUMBERED_MARK = re.compile(r"<image[ _:#-]?(\d{1,3})>", re.I)
# Spellings of an unnumbered mark in some sets.
OTHER_MARKS = re.compile(
    r"<\|(?:image|img)(?:[_ -]?(?:pad|token|placeholder|\d+))?\|>|<image[_ -]?(?:here|content|placeholder|token)>"
    r"|<(?:im|image)_start>\s*<image>\s*<(?:im|image)_end>|<image>\s*</image>|<image\s*/?>|<start_of_image>",
    re.I,
)
# Words that mark an image's place if there are as many of them as images, and are ordinary words otherwise.
LOOSE_MARK = re.compile(r"\[(?:img|image|picture)[ _-]?\d{0,2}\]|\{\{?image\}\}?|<<image>>|<(?:picture|pic)>", re.I)
OTHER_MEDIA = re.compile(r"<\|(?:(video)|audio)(?:[_ -]?(?:pad|token|placeholder|\d+))?\|>", re.I)
IMAGE_TAG = re.compile(r"<img>\s*([^\s<>](?:[^<>\n]{0,998}[^\s<>])?)\s*</img>")  # the path of an image, in its place
# At the start or end of a line, as sets place it.
MEDIA_MARK = re.compile(r"(?m)^[^\S\n]*<(video|audio|speech|sound)>|<(video|audio|speech|sound)>\s*$")
# An image in Markdown or HTML, and code, in which it would not count.
IMAGE_LINK = re.compile(
    r"!\[[^\]\n]{0,1000}\]\(\s{0,9}[^\s()][^()\n]{0,4000}\)|<img\s(?:[^<>]{0,4000}\s)?src\s{0,9}=[^<>]{1,4000}>", re.I
)
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.S)
OTHER_TAG = re.compile(r"</?(?!img\b)[a-z][^<>]*>", re.I)  # of HTML that is itself the subject of a question
# Control tokens of the model, which ``encoding.captions`` drops: a sample's text must not contain them.
CONTROL = re.compile(r"<\|[\w-]+\|>|<IMG_CONTEXT>|</?img>|</?s>")
