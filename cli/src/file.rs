//! Configuration files: YAML (and so JSON too), read strictly. An error names the file, line, column and field, says what
//! is allowed there, and where a field is unknown which one was probably meant.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_saphyr::Error;

use crate::failure::Failure;

/// The largest file that is read: far beyond any configuration, so that a slip of the finger does not fill the memory.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// Reads a file.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    parse(&read_text(path)?, &path.display().to_string())
}

/// Reads a file's text, if it is not absurdly long.
pub(crate) fn read_text(path: &Path) -> Result<String, Failure> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| {
        Failure::new(format!("cannot read {shown}"))
            .because(error)
            .try_this("check the path, and whether this user may read it")
    };
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > FILE_MAX_BYTES {
        return Err(Failure::new(format!("{shown} is {length} bytes long"))
            .because(format!("a configuration has at most {FILE_MAX_BYTES}")));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

/// Reads a text that came from `name`.
pub(crate) fn parse<T: DeserializeOwned>(text: &str, name: &str) -> Result<T, Failure> {
    let options = serde_saphyr::options! { with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| explain(text, name, &error))
}

/// Fields that are looked for beside another one, and where they are instead.
const ELSEWHERE: &[(&str, &str, &str)] = &[
    ("pause", "stall", "how long a pause holds a request is wait, under pauses"),
    (
        "hold",
        "stall",
        "how long a request is held while its slice moves is hold_wait, beside timeouts",
    ),
];

fn explain(text: &str, name: &str, error: &Error) -> Failure {
    let location = error.location();
    let place = location
        .map_or_else(|| name.to_owned(), |at| format!("{name}:{}:{}", at.line(), at.column()));
    match error.without_snippet() {
        Error::SerdeUnknownField { field, expected, .. } => {
            let known = Failure::new(format!("{place}: unknown field {field:?}"))
                .because(format!("known here: {}", expected.join(", ")));
            let elsewhere = ELSEWHERE
                .iter()
                .find(|(name, beside, _)| name == field && expected.contains(beside));
            match (elsewhere, closest(field, expected)) {
                (Some((.., place)), _) => known.try_this(place),
                (None, Some(meant)) => known.try_this(format!("did you mean {meant:?}?")),
                (None, None) => known,
            }
        }
        Error::SerdeMissingField { field, .. } => {
            Failure::new(format!("{place}: the field {field:?} is missing"))
        }
        other => {
            let field = location.and_then(|at| field_at(text, at.line()));
            let problem = plain(other, location.map(|at| (at.line(), at.column())));
            match field {
                Some(field) => Failure::new(format!("{place}: {field}: {problem}")),
                None => Failure::new(format!("{place}: {problem}")),
            }
        }
    }
}

/// The message without the place that it ends with, for that stands in front already.
fn plain(error: &Error, place: Option<(u64, u64)>) -> String {
    let message = error.to_string();
    let message = message.lines().next().unwrap_or_default();
    let Some((line, column)) = place else { return message.to_owned() };
    let tail = format!(" at line {line}, column {column}");
    message.replace(&tail, "")
}

/// The field that a line sets, if it does so the usual way.
fn field_at(text: &str, line: u64) -> Option<&str> {
    let line = text.lines().nth(usize::try_from(line).ok()?.checked_sub(1)?)?;
    let (field, _) = line.split_once(':')?;
    let field = field.trim().trim_start_matches("- ").trim_matches(['"', '\'', '{', ' ']);
    let usual = field.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    (usual && !field.is_empty()).then_some(field)
}

/// The known field that is nearest by edits, if it is near enough to have been meant.
pub(crate) fn closest<'a>(field: &str, known: &[&'a str]) -> Option<&'a str> {
    let (edits, name) = known.iter().map(|name| (edits(field, name), *name)).min()?;
    (edits <= 1 + field.len() / 4).then_some(name)
}

/// How many letters must be put in, left out, changed or swapped with their neighbour to turn one text into the other.
fn edits(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = change.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::units::{Share, Span};

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        name: String,
        #[serde(default)]
        wait: Option<Span>,
        #[serde(default)]
        band: Option<Share>,
        #[serde(default)]
        nested: Option<Nested>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Nested {
        min: u32,
    }

    fn error(text: &str) -> String {
        parse::<Sample>(text, "kv.yaml").unwrap_err().to_string()
    }

    #[test]
    fn a_good_file_is_read_and_json_too() {
        let yaml = "# a comment\nname: kv\nwait: 5s\nband: 10%\nnested: {min: 2}\n";
        let json = r#"{"name": "kv", "wait": "5s", "band": "10%", "nested": {"min": 2}}"#;
        let sample: Sample = parse(yaml, "kv.yaml").unwrap();
        assert_eq!(sample.wait, Some("5s".parse().unwrap()));
        assert_eq!(parse::<Sample>(json, "kv.json").unwrap(), sample);
    }

    #[test]
    fn an_unknown_field_has_a_place_and_a_suggestion() {
        let error = error("name: kv\nbnad: 10%\n");
        assert!(error.starts_with("error: kv.yaml:2:1: unknown field \"bnad\""), "{error}");
        assert!(error.contains("known here: name, wait, band, nested"), "{error}");
        assert!(error.ends_with("try: did you mean \"band\"?"), "{error}");
        let far = self::error("name: kv\ncolour: red\n");
        assert!(!far.contains("did you mean"), "{far}");
    }

    #[test]
    fn a_wrong_value_names_field_line_and_what_is_allowed() {
        let cases = [
            ("name: kv\nwait: 5\n", "kv.yaml:2:7: wait: \"5\" is no duration: give a number"),
            ("name: kv\nwait: 5 parsecs\n", "kv.yaml:2:7: wait: \"5 parsecs\" is no duration"),
            ("name: kv\nband: 0.1\n", "kv.yaml:2:7: band: \"0.1\" is no share: give percent"),
            ("name: kv\nwait: [5s]\n", "kv.yaml:2:1: wait: invalid type: sequence"),
            ("name: kv\nnested:\n  min: -1\n", "kv.yaml:3:8: min: "),
        ];
        for (text, expected) in cases {
            let error = error(text);
            assert!(error.starts_with(&format!("error: {expected}")), "{error}");
            assert!(!error.contains("at line"), "{error}");
        }
    }

    #[test]
    fn what_is_missing_or_twice_or_no_yaml_is_named() {
        assert!(error("wait: 5s\n").contains("the field \"name\" is missing"));
        assert!(error("name: a\nname: b\n").contains("kv.yaml:2:1: name: duplicate"));
        assert!(error("name: [kv\n").starts_with("error: kv.yaml:"));
        let missing = read::<Sample>(Path::new("/nonexistent/kv.yaml")).unwrap_err().to_string();
        assert!(missing.starts_with("error: cannot read /nonexistent/kv.yaml"), "{missing}");
    }
}
