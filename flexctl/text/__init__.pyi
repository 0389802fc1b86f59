# Written by `make docs`; a test checks that it is current.

from flexctl.text.corpus import Corpus as Corpus
from flexctl.text.corpus import prepare_corpus as prepare_corpus
from flexctl.text.corpus import text_digest as text_digest
from flexctl.text.documents import Record as Record
from flexctl.text.documents import pinned as pinned
from flexctl.text.documents import read_documents as read_documents
from flexctl.text.documents import read_records as read_records
from flexctl.text.documents import sample_halves as sample_halves
from flexctl.text.documents import sample_passages as sample_passages
from flexctl.text.documents import size_bytes as size_bytes
from flexctl.text.documents import source_name as source_name
from flexctl.text.documents import text_files as text_files
from flexctl.text.found_text import DOMAINS as DOMAINS
from flexctl.text.found_text import write_domain as write_domain
from flexctl.text.sample import PublicSample as PublicSample
from flexctl.text.sample import draw_sample as draw_sample
from flexctl.text.sample import leading as leading
from flexctl.text.tokenizer import refuse_other_tokenizer as refuse_other_tokenizer
from flexctl.text.tokenizer import refuse_tokens_beyond as refuse_tokens_beyond
from flexctl.text.tokenizer import train_tokenizer as train_tokenizer
from flexctl.text.tokens import Framed as Framed
from flexctl.text.tokens import TokenStream as TokenStream
from flexctl.text.tokens import frame_documents as frame_documents
from flexctl.text.tokens import frame_passages as frame_passages
from flexctl.text.tokens import pack as pack
