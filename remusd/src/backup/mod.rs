//! The backup: takes epochs in, acknowledges them, feeds the stock receiver, activates the copy.
