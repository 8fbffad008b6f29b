"""HTML pages, each a single file: a report of one posterior, or a comparison of several.

* ``report``: the page about one posterior.
* ``comparison``: the page about several posteriors.
* ``gallery``: the figures of both pages, with their main numbers as text.
* ``glossary``: the name, number format and direction of each metric.
* ``shifts``: the part of both pages about corrupted data.
* ``page``: tables, figures and rendering of templates.
* ``templates``: Jinja2 templates and the style sheet.
"""
