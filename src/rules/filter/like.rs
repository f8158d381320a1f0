//! LIKE patterns (PostgreSQL manual, section 9.7.1), for text under a deterministic collation: characters are compared
//! one by one, whatever the locale.

/// A compiled pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern(Vec<Piece>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    Exactly(char),
    AnyOne,
    AnyMany,
}

impl Pattern {
    /// Compiles; `None` when the pattern ends with the escape character, which PostgreSQL reports as an error only when
    /// a row gets that far.
    pub(super) fn new(text: &str, escape: Option<char>) -> Option<Pattern> {
        let mut pieces = Vec::new();
        let mut chars = text.chars();
        while let Some(char) = chars.next() {
            pieces.push(match char {
                _ if Some(char) == escape => Piece::Exactly(chars.next()?),
                '%' => Piece::AnyMany,
                '_' => Piece::AnyOne,
                _ => Piece::Exactly(char),
            });
        }
        Some(Pattern(pieces))
    }

    /// The pattern with the default escape character, for SQL.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for piece in &self.0 {
            match piece {
                Piece::AnyMany => text.push('%'),
                Piece::AnyOne => text.push('_'),
                Piece::Exactly(char) => {
                    if matches!(char, '%' | '_' | '\\') {
                        text.push('\\');
                    }
                    text.push(*char);
                }
            }
        }
        text
    }

    /// Whether the whole text matches. Only the last `%` ever needs another try: what an earlier one would take more, the
    /// later one can take as well.
    pub(super) fn matches(&self, text: &str) -> bool {
        let mut at = 0;
        let mut rest = text.chars();
        let mut retry = None;
        loop {
            match self.0.get(at) {
                Some(Piece::AnyMany) => {
                    at += 1;
                    retry = Some((at, rest.clone()));
                    continue;
                }
                Some(piece) => {
                    let next = rest.next();
                    if next.is_some_and(|char| *piece == Piece::AnyOne || *piece == Piece::Exactly(char)) {
                        at += 1;
                        continue;
                    }
                    if next.is_none() {
                        return false;
                    }
                }
                None if rest.as_str().is_empty() => return true,
                None => {}
            }
            match &mut retry {
                Some((after, from)) => {
                    if from.next().is_none() {
                        return false;
                    }
                    at = *after;
                    rest = from.clone();
                }
                None => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_like_does() {
        for (text, pattern, escape, matches) in [
            ("abc", "abc", Some('\\'), true),
            ("abc", "a%", Some('\\'), true),
            ("abc", "_b_", Some('\\'), true),
            ("abc", "c", Some('\\'), false),
            ("", "%", Some('\\'), true),
            ("", "_", Some('\\'), false),
            ("aXbXc", "a%X%c", Some('\\'), true),
            ("abab", "%ab", Some('\\'), true),
            ("aab", "%ab_", Some('\\'), false),
            ("100%", "100\\%", Some('\\'), true),
            ("100x", "100\\%", Some('\\'), false),
            ("a_b", "a#_b", Some('#'), true),
            ("axb", "a#_b", Some('#'), false),
            ("a\\b", "a\\b", None, true),
            ("a\\b", "a\\\\b", Some('\\'), true),
            ("ä😀ö", "___", Some('\\'), true),
            ("ä😀ö", "%😀_", Some('\\'), true),
            ("aaaaaaaaaaaaaaaaaaaaaaaaaaab", "%a%a%a%a%a%a%a%c", Some('\\'), false),
        ] {
            let compiled = Pattern::new(pattern, escape).unwrap();
            assert_eq!(compiled.matches(text), matches, "{text:?} LIKE {pattern:?}");
            let again = Pattern::new(&compiled.text(), Some('\\')).unwrap();
            assert_eq!(again, compiled);
        }
        assert_eq!(Pattern::new("ab\\", Some('\\')), None);
    }
}
