"""The text of HTML and PDF files; needs the packages of the extra `documents`."""

import logging
import re

from fgpt_hf.data.encodings import open_text
from fgpt_hf.data.local_files import LocalFile
from fgpt_hf.errors import UserError

DOCUMENTS_EXTRA = "pip install 'fgpt-hf[documents]'"
WITHOUT_TEXT = ["head", "script", "style", "noscript", "template", "nav"]
BLOCKS = [  # a browser begins a new line before these and after them
    *("address", "article", "aside", "blockquote", "dd", "div", "dl", "dt", "figure", "footer", "form", "h1", "h2"),
    *("h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre", "section", "table", "tr", "ul"),
]
NO_TEXT = "a PDF without text: recognize its characters first, such as with ocrmypdf"


def text_of_html(file: LocalFile, encoding: str) -> str:
    """Return the text of a page as a browser breaks it into lines, without scripts, styles and menus.

    Raises:
        UserError: beautifulsoup4 is not installed.
    """
    try:
        from bs4 import BeautifulSoup
        from bs4.element import NavigableString
    except ImportError as error:
        raise UserError(f"{file.path} is HTML, whose text needs beautifulsoup4: {DOCUMENTS_EXTRA}") from error
    with open_text(file, encoding) as text:
        page = BeautifulSoup(text.read(), "html.parser")
    for tag in page(WITHOUT_TEXT):
        tag.decompose()
    for node in page.find_all(string=True):
        if type(node) is NavigableString and node.find_parent("pre") is None:  # comments have a type of their own
            node.replace_with(re.sub(r"\s+", " ", node))
    for tag in page("br"):
        tag.replace_with("\n")
    for tag in page(BLOCKS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    lines = "\n".join(line.rstrip() if "  " in line else line.strip() for line in page.get_text().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def text_of_pdf(file: LocalFile) -> str:
    """Return the text of a document's pages, with a blank line between two.

    Raises:
        UserError: pypdf is not installed, or the file is damaged or locked.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise UserError(f"{file.path} is a PDF, whose text needs pypdf: {DOCUMENTS_EXTRA}") from error
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every page that is not quite as it should be
    try:
        return "\n\n".join(filter(str.strip, (page.extract_text() for page in PdfReader(file.path).pages)))
    except PyPdfError as error:
        raise UserError(f"{file.path} cannot be read, it may be damaged or locked by a password: {error}") from error
