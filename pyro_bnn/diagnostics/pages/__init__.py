"""Pages of HTML, one file each: about one posterior, or about several that are compared.

* ``report``: the page about one posterior.
* ``comparison``: the page about several.
* ``gallery``: the pictures of both, with their main numbers in words.
* ``glossary``: how each metric is called and written.
* ``page``: tables and pictures, and how a template is filled in.
* ``templates``: what pages look like: Jinja2 templates and the style sheet.
"""
