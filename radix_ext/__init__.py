"""What is cached, where, and who may use it: the approximate side of SGLang's radix cache."""
