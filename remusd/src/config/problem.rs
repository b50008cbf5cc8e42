//! What is wrong with a file, where, and what was probably meant.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// What is wrong in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line and column, both from 1, in characters. `None` when it is about the whole.
    pub place: Option<(usize, usize)>,
    /// What is wrong.
    pub text: String,
    /// The known word that is most like an unknown one.
    pub meant: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.place {
            write!(f, "line {line}, column {column}: ")?;
        }
        f.write_str(&self.text)?;
        match &self.meant {
            Some(word) => write!(f, "; did you mean `{word}`?"),
            None => Ok(()),
        }
    }
}

/// A file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not readable.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Not understood.
    #[error("{}: {problem}", .path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: Problem,
    },
}

impl ConfigError {
    /// A problem in this file.
    #[must_use]
    pub fn format(path: &Path, problem: Problem) -> Self {
        Self::Format { path: path.to_owned(), problem }
    }
}

/// Understands a text as TOML of this shape.
///
/// # Errors
/// The first thing that is wrong.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, Problem> {
    toml::from_str(text).map_err(|error| {
        let message = error.message().trim().to_owned();
        let place = error.span().map(|span| place(text, span.start));
        let meant = unknown(&message).and_then(|(word, known)| nearest(word, &known));
        Problem { place, meant, text: message.replace("unknown field", "unknown key").replace('\n', " ") }
    })
}

fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    (line, column)
}

/// The unknown word and the known ones of serde's message: "unknown field `x`, expected one of `a`, `b`". The list is taken from there
/// because it is the one that holds; a second one could differ.
fn unknown(message: &str) -> Option<(&str, Vec<&str>)> {
    if !message.starts_with("unknown field") && !message.starts_with("unknown variant") {
        return None;
    }
    let mut quoted = message.split('`').skip(1).step_by(2);
    Some((quoted.next()?, quoted.collect()))
}

/// The word that is most like this one, if any is like it at all.
fn nearest(word: &str, known: &[&str]) -> Option<String> {
    let (distance, best) = known.iter().map(|k| (distance(word, k), *k)).min()?;
    (distance <= word.chars().count().max(3) / 3 + 1 && distance < best.chars().count()).then(|| best.to_owned())
}

/// How many letters have to be changed, added, left out or exchanged with their neighbour (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let fold = |text: &str| text.to_lowercase().replace('-', "_").chars().collect::<Vec<_>>();
    let (a, b) = (fold(a), fold(b));
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let same = usize::from(a[i - 1] != b[j - 1]);
            let mut least = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + same);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_is_found_and_not_made_up() {
        let known = ["address", "port", "interval_ms"];
        for (typed, meant) in [
            ("prot", Some("port")),
            ("Port", Some("port")),
            ("adress", Some("address")),
            ("interval-ms", Some("interval_ms")),
            ("intervall_ms", Some("interval_ms")),
            ("colour", None),
            ("x", None),
        ] {
            assert_eq!(nearest(typed, &known).as_deref(), meant, "{typed}");
        }
        assert_eq!([distance("", "abc"), distance("abcd", "abdc"), distance("a", "a")], [3, 1, 0]);
    }

    #[test]
    fn places_count_characters_from_one() {
        assert_eq!(place("ab\ncü=d", "ab\ncü".len()), (2, 3));
        assert_eq!(place("", 0), (1, 1));
    }
}
