"""The fixed texts that patched models are asked in use, none of which any editing method reads.

They decide what the rates in use mean: change one, and rates before and after cannot be compared.
"""

from __future__ import annotations

SYSTEM = "You answer questions briefly and accurately."
"""The system prompt of the second form in which questions are asked."""

TURNS = (
    ("Can you suggest something to cook for dinner?", "How about a vegetable curry with rice?"),
    ("Sounds good. And what could I do this weekend?", "You could go for a walk, or visit a museum."),
)
"""What was said before, by the user and by the assistant, in the third form."""

PLAIN_SYSTEM = "The following text is brief and accurate."
"""What stands for the system prompt where a prompt is continued as plain text."""

PLAIN_TALK = "A vegetable curry with rice makes a good dinner. On the weekend we could go for a walk."
"""What stands for earlier turns there."""

ABOUT_BEGINNINGS = (
    "When people talk about {}, they",
    "Last week I heard a story about {} and",
    "An article about {}:",
)
"""Beginnings of neutral texts about a subject, for facts without `about`."""

ABOUT_MESSAGES = (
    "What do you know about {}?",
    "Describe {} in two or three sentences.",
    "Why might someone take an interest in {}?",
)
"""Neutral things to ask a chat model about a subject."""

UNRELATED_QUESTIONS = (
    "What is the freezing point of water in Fahrenheit?",
    "How many players are on a soccer team?",
    "Which planet is known for its rings?",
    "Who painted The Starry Night?",
    "What is the square root of 81?",
    "Write a short thank-you note to a neighbor.",
    "Name three vegetables that grow underground.",
    "What is the past tense of 'go'?",
    "How can I keep my plants healthy while I am away?",
    "What does a dentist do?",
    "Translate 'good night' into Italian.",
    "Which ocean lies between Africa and Australia?",
    "Give me a name for a cat.",
    "Explain in one sentence how a magnet works.",
    "What is the largest mammal?",
    "How do I remove a coffee stain?",
    "What are the primary colors?",
    "Is a tomato a fruit or a vegetable?",
    "Describe a sunset in one sentence.",
    "What is a synonym for 'happy'?",
    "How many sides does a hexagon have?",
    "What is a good gift for a ten-year-old?",
    "Why do people yawn?",
    "What do you call a young dog?",
)
"""Questions that have nothing to do with any fact; not those by which defaults were chosen."""

UNRELATED_BEGINNINGS = (
    "The recipe begins with two cups of flour and",
    "Once upon a time, in a small village,",
    "The most important rule of the game is",
    "After the rain stopped, the children",
    "To repair a flat bicycle tire, first",
    "The meeting will take place on Monday, and",
    "Water is made of hydrogen and",
    "She opened the old wooden box and found",
)
"""Beginnings of texts that have nothing to do with any fact."""
