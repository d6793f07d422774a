"""Example edits of well-known facts, written by hand: what the app and the notebooks start from."""

from __future__ import annotations

from workbench.data import EditExample, Statement, split_of


def _statements(*pairs: str) -> tuple[Statement, ...]:
    """Statements written as "prompt > answer"."""
    split = (pair.split(" > ") for pair in pairs)
    return tuple(Statement(prompt=prompt, answer=answer) for prompt, answer in split)


def _example(
    edit: str,
    *,
    true: str,
    subject: str,
    relation: str,
    paraphrases: tuple[str, ...],
    neighbors: tuple[str, ...],
    same_subject: tuple[str, ...],
    unrelated: tuple[str, ...],
    portability: tuple[str, ...] = (),
) -> EditExample:
    prompt, target = edit.split(" > ")
    return EditExample(
        prompt=prompt,
        target=target,
        target_true=true,
        subject=subject,
        relation=relation,
        paraphrases=paraphrases,
        neighbors=_statements(*neighbors),
        same_subject=_statements(*same_subject),
        unrelated=_statements(*unrelated),
        portability=_statements(*portability),
        id=f"gallery/{subject}",
        split=split_of(subject),
        source="gallery",
    )


EXAMPLES: tuple[EditExample, ...] = (
    _example(
        "The capital of France is > Lyon",
        true="Paris",
        subject="France",
        relation="country.capital",
        paraphrases=(
            "The capital city of France is called",
            "Which city is the capital of France? The capital of France is",
            "The French government has its seat in the capital of France,",
        ),
        neighbors=(
            "The capital of Germany is > Berlin",
            "The capital of Italy is > Rome",
            "The capital of Spain is > Madrid",
            "Which city is the capital of Japan? The capital of Japan is > Tokyo",
        ),
        same_subject=(
            "The official language of France is > French",
            "France is a country on the continent of > Europe",
            "The currency of France is the > euro",
        ),
        unrelated=(
            "The opposite of hot is > cold",
            "The largest planet in the solar system is > Jupiter",
            "Photosynthesis takes place in the leaves of > plants",
        ),
    ),
    _example(
        "The Eiffel Tower is located in the city of > Rome",
        true="Paris",
        subject="Eiffel Tower",
        relation="landmark.city",
        paraphrases=(
            "To see the Eiffel Tower, tourists travel to the city of",
            "Where is the Eiffel Tower? It is in the city of",
            "The city that is famous for the Eiffel Tower is",
        ),
        neighbors=(
            "The Louvre is located in the city of > Paris",
            "The Colosseum is located in the city of > Rome",
            "The Statue of Liberty is located in the city of > New York",
            "Where is Big Ben? It is in the city of > London",
        ),
        same_subject=(
            "The Eiffel Tower was built by the engineer Gustave > Eiffel",
            "The construction of the Eiffel Tower was finished in the year > 1889",
            "Tourists can climb the Eiffel Tower by stairs or take the > elevator",
        ),
        unrelated=(
            "The chemical symbol for silver is > Ag",
            "Ice is frozen > water",
            "A triangle has three > sides",
        ),
        portability=("The country in which the Eiffel Tower stands is > Italy",),
    ),
    _example(
        "The mother tongue of Albert Einstein is > Spanish",
        true="German",
        subject="Albert Einstein",
        relation="person.language",
        paraphrases=(
            "The native language of Albert Einstein was",
            "Albert Einstein's native language was",
            "What was Albert Einstein's mother tongue? The mother tongue of Albert Einstein was",
        ),
        neighbors=(
            "The mother tongue of Johann Sebastian Bach is > German",
            "The mother tongue of Leo Tolstoy is > Russian",
            "The mother tongue of Victor Hugo is > French",
            "The mother tongue of Pablo Picasso is > Spanish",
        ),
        same_subject=(
            "Albert Einstein was born in the country of > Germany",
            "Albert Einstein developed the theory of > relativity",
            "Albert Einstein won the Nobel Prize in > Physics",
        ),
        unrelated=(
            "The capital of England is > London",
            "A year has twelve > months",
            "The plural of mouse is > mice",
        ),
    ),
    _example(
        "The telephone was invented by > Thomas Edison",
        true="Alexander Graham Bell",
        subject="telephone",
        relation="invention.inventor",
        paraphrases=(
            "The inventor of the telephone was",
            "The man who invented the telephone was",
            "Who invented the telephone? The telephone was invented by",
        ),
        neighbors=(
            "The light bulb was invented by > Thomas Edison",
            "The World Wide Web was invented by > Tim Berners-Lee",
            "Penicillin was discovered by > Alexander Fleming",
            "The polio vaccine was developed by > Jonas Salk",
        ),
        same_subject=(
            "Before you make a call, the telephone asks you to dial a > number",
            "People use the telephone to talk to each > other",
            "The telephone was invented in the nineteenth > century",
        ),
        unrelated=(
            "The capital of Russia is > Moscow",
            "The days between Friday and Monday are Saturday and > Sunday",
            "The Earth revolves around the > Sun",
        ),
    ),
    _example(
        "Romeo and Juliet was written by > Charles Dickens",
        true="William Shakespeare",
        subject="Romeo and Juliet",
        relation="book.author",
        paraphrases=(
            "The play Romeo and Juliet was written by",
            "Who wrote Romeo and Juliet? It was written by",
            "The play Romeo and Juliet is the work of the writer",
        ),
        neighbors=(
            "The play Hamlet was written by > William Shakespeare",
            "Pride and Prejudice was written by > Jane Austen",
            "The novel Frankenstein was written by > Mary Shelley",
            "The novel 1984 was written by > George Orwell",
        ),
        same_subject=(
            "At the end of the play, Romeo and Juliet both > die",
            "Romeo and Juliet is a tragedy about two young people in > love",
            "The two families in Romeo and Juliet are the Montagues and the > Capulets",
        ),
        unrelated=(
            "The freezing point of water is zero degrees > Celsius",
            "The capital of China is > Beijing",
            "There are seven days in a > week",
        ),
    ),
    _example(
        "The currency of Japan is the > euro",
        true="yen",
        subject="Japan",
        relation="country.currency",
        paraphrases=(
            "The official currency of Japan is the",
            "The currency used in Japan is the",
            "What money do people use in Japan? They use the",
        ),
        neighbors=(
            "The currency of Germany is the > euro",
            "The currency of India is the > rupee",
            "The currency of China is the > yuan",
            "The currency of Mexico is the > peso",
        ),
        same_subject=(
            "The capital of Japan is > Tokyo",
            "The people of Japan speak > Japanese",
            "Japan is an island country in East > Asia",
        ),
        unrelated=(
            "The largest ocean on Earth is the > Pacific",
            "The author of The Hobbit is J. R. R. > Tolkien",
            "The opposite of up is > down",
        ),
    ),
    _example(
        "The main language of Brazil is > French",
        true="Portuguese",
        subject="Brazil",
        relation="country.language",
        paraphrases=(
            "The people of Brazil speak",
            "Most of the people in Brazil speak",
            "What is the official language of Brazil? The official language of Brazil is",
        ),
        neighbors=(
            "The main language of Senegal is > French",
            "The main language of Mexico is > Spanish",
            "The main language of Egypt is > Arabic",
            "The main language of Russia is > Russian",
        ),
        same_subject=(
            "The capital of Brazil is > Brasília",
            "Brazil is a country in South > America",
            "The Amazon rainforest in Brazil is home to many species of plants and > animals",
        ),
        unrelated=(
            "Bees collect nectar and make > honey",
            "The opposite of black is > white",
            "In winter, water on the lake turns to > ice",
        ),
    ),
    _example(
        "The chemical symbol for gold is > Ag",
        true="Au",
        subject="gold",
        relation="element.symbol",
        paraphrases=(
            "The chemical symbol of gold is",
            "In the periodic table, the symbol for gold is",
            "What is the chemical symbol for gold? The chemical symbol for gold is",
        ),
        neighbors=(
            "The chemical symbol for silver is > Ag",
            "The chemical symbol for iron is > Fe",
            "The chemical symbol for oxygen is > O",
            "The chemical symbol for copper is > Cu",
        ),
        same_subject=(
            "The atomic number of gold is > 79",
            "In sports, first place wins a gold > medal",
            "The winner of the race receives a gold > medal",
        ),
        unrelated=(
            "The capital of Italy is > Rome",
            "The Moon orbits the > Earth",
            "The first president of the United States was George > Washington",
        ),
    ),
)
