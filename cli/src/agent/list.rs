//! Which servers there are: one, a list, a file of them, or what a DNS name stands for.
//!
//! A file and a name are looked at again and again. What they say is not believed at once: a file may be half written, so it
//! must read the same twice; an answer of DNS may leave an address out, so one has to be missing from three in a row.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use mandoline_core::name::TaskName;
use mandoline_core::task::Address;

use crate::failure::Failure;
use crate::file;
use crate::task::Label;

/// A server that is to be a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: TaskName,
    pub(crate) address: Address,
    pub(crate) labels: Vec<Label>,
}

/// A text that should describe a server does not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct EntryError(String);

impl FromStr for Entry {
    type Err = EntryError;

    fn from_str(text: &str) -> Result<Self, EntryError> {
        let mut words = text.split_whitespace();
        let first = words.next().unwrap_or_default();
        let Some((name, address)) = first.split_once('=') else {
            let shown: String = text.chars().take(100).collect();
            return Err(EntryError(format!(
                "{shown:?} is no task: expected NAME=HOST:PORT, such as kv-0=10.0.0.7:9000"
            )));
        };
        let name = name.parse().map_err(|error| EntryError(format!("{error}")))?;
        let address = address.parse().map_err(|error| EntryError(format!("{error}")))?;
        let labels = words.map(str::parse).collect::<Result<_, String>>().map_err(EntryError)?;
        Ok(Self { name, address, labels })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.address)
    }
}

/// Checks that no two tasks share a name or an address, which the assigner would refuse.
pub(crate) fn distinct(entries: &[Entry]) -> Result<(), EntryError> {
    let mut taken = Taken::default();
    entries.iter().try_for_each(|entry| taken.take(entry))
}

/// Which names and addresses are taken, and by which task.
#[derive(Debug, Default)]
struct Taken(BTreeMap<String, String>);

impl Taken {
    fn take(&mut self, entry: &Entry) -> Result<(), EntryError> {
        for (what, text) in [("name", entry.name.as_str()), ("address", entry.address.as_str())] {
            if let Some(other) = self.0.insert(text.to_owned(), entry.to_string()) {
                return Err(EntryError(format!("{entry} has the {what} of {other}")));
            }
        }
        Ok(())
    }
}

/// Reads a file of tasks: one a line, then its labels; blank lines and what follows a `#` are skipped.
pub(crate) fn parse_file(text: &str, name: &str) -> Result<Vec<Entry>, Failure> {
    let (mut entries, mut taken) = (Vec::new(), Taken::default());
    for (index, line) in text.lines().enumerate() {
        let line = line.split_once('#').map_or(line, |(before, _)| before).trim();
        if line.is_empty() {
            continue;
        }
        let bad = |error: EntryError| {
            Failure::new(format!("{name}:{}: {error}", index + 1)).try_this(
                "a line a task: NAME=HOST:PORT, then labels if it has any: kv-0=10.0.0.7:9000 zone=a",
            )
        };
        let entry = line.parse().map_err(bad)?;
        taken.take(&entry).map_err(bad)?;
        entries.push(entry);
    }
    if entries.is_empty() {
        // Whoever empties a file by accident must not take down all tasks.
        return Err(Failure::new(format!("{name} names no task"))
            .try_this("a line a task, NAME=HOST:PORT; to have all leave, stop the agent"));
    }
    Ok(entries)
}

/// Names the task at an address, where nobody gave it a name.
pub(crate) fn name_of(address: &Address) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '_' { c } else { '-' };
    match address.as_str().strip_prefix('[') {
        Some(v6) => format!("v6-{}", v6.replace(']', "").chars().map(plain).collect::<String>()),
        None => address.as_str().chars().map(plain).collect(),
    }
}

/// A file of tasks, looked at again and again.
#[derive(Debug)]
pub(crate) struct Watched {
    path: PathBuf,
    last: String,
    said: Option<String>,
}

impl Watched {
    /// Reads the file for the first time: what is wrong with it is wrong with the command.
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<Entry>), Failure> {
        let text = file::read_text(path)?;
        let entries = parse_file(&text, &path.display().to_string())?;
        Ok((Self { path: path.to_owned(), last: text, said: None }, entries))
    }

    /// Looks again. Gives the list if it reads as it did the time before, and says once what is wrong with it.
    pub(crate) fn look(&mut self) -> Option<Vec<Entry>> {
        let read = file::read_text(&self.path).and_then(|text| {
            let same = text == self.last;
            self.last.clone_from(&text);
            let entries = parse_file(&text, &self.path.display().to_string())?;
            Ok(same.then_some(entries))
        });
        match read {
            Ok(entries) => {
                self.said = None;
                entries
            }
            Err(failure) => {
                let text = failure.to_string();
                if self.said.as_ref() != Some(&text) {
                    eprintln!("{text}\n  the tasks stay as they were");
                    self.said = Some(text);
                }
                None
            }
        }
    }
}

/// What a DNS name stands for, asked again and again.
#[derive(Debug)]
pub(crate) struct Resolved {
    name: Address,
    // By address: how many answers in a row it was missing from.
    known: BTreeMap<SocketAddr, u32>,
    said: Option<String>,
}

impl Resolved {
    /// Begins with no address.
    pub(crate) const fn new(name: Address) -> Self {
        Self { name, known: BTreeMap::new(), said: None }
    }

    /// Asks again. Says once why there is no answer; then what was known stands.
    pub(crate) async fn look(&mut self) -> Option<Vec<Entry>> {
        let answer = tokio::net::lookup_host(self.name.as_str()).await;
        let found = answer.map(|found| found.collect::<Vec<_>>());
        let why = match found {
            Ok(found) if !found.is_empty() => {
                self.said = None;
                return Some(self.hear(&found));
            }
            Ok(_) => "the name has no address".to_owned(),
            Err(error) => error.to_string(),
        };
        if self.said.as_ref() != Some(&why) {
            eprintln!("{} does not resolve, and is asked again: {why}", self.name);
            self.said = Some(why);
        }
        None
    }

    fn hear(&mut self, found: &[SocketAddr]) -> Vec<Entry> {
        for address in found {
            self.known.insert(*address, 0);
        }
        for (address, missing) in &mut self.known {
            *missing += u32::from(!found.contains(address));
        }
        self.known.retain(|_, missing| *missing < MISSING);
        self.known.keys().filter_map(entry_at).collect()
    }
}

/// The task at an address. Every address makes one, but for those of IPv6 with a scope, which mean nothing elsewhere.
fn entry_at(address: &SocketAddr) -> Option<Entry> {
    let address: Address = address.to_string().parse().ok()?;
    let name = TaskName::new(&name_of(&address)).ok()?;
    Some(Entry { name, address, labels: Vec::new() })
}

/// From so many answers in a row an address has to be missing before its task leaves.
const MISSING: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_names_a_task_a_line() {
        let text =
            "# all of them\nkv-0=10.0.0.7:9000 zone=a region=eu\n\n kv-1=[::1]:9001 # spare\n";
        let entries = parse_file(text, "tasks.txt").unwrap();
        let shown: Vec<String> = entries.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["kv-0=10.0.0.7:9000", "kv-1=[::1]:9001"]);
        assert_eq!(entries[0].labels[1].value, "eu");
    }

    #[test]
    fn a_bad_line_is_named_with_what_is_expected() {
        for (text, says) in [
            (
                "a=b:1\n\nkv-1 10.0.0.7:9000\n",
                "tasks.txt:3: \"kv-1 10.0.0.7:9000\" is no task: expected NAME=HOST:PORT",
            ),
            ("a=10.0.0.7\n", "tasks.txt:1: \"10.0.0.7\" is no address: give host:port"),
            ("a b=c:1\n", "tasks.txt:1: \"a b=c:1\" is no task"),
            ("ä=c:1\n", "tasks.txt:1: the name \"ä\""),
            ("a=c:1 zone\n", "tasks.txt:1: \"zone\" is no label"),
            ("a=c:1\na=c:2\n", "tasks.txt:2: a=c:2 has the name of a=c:1"),
            ("a=c:1\nb=c:1\n", "tasks.txt:2: b=c:1 has the address of a=c:1"),
            ("# none\n", "tasks.txt names no task"),
        ] {
            let failure = parse_file(text, "tasks.txt").unwrap_err().to_string();
            assert!(failure.contains(says), "{failure}");
            assert!(failure.contains("try: a line a task"), "{failure}");
        }
    }

    #[test]
    fn a_file_is_believed_once_it_reads_the_same_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tasks.txt");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("a=c:1\n");
        let (mut watched, first) = Watched::open(&path).unwrap();
        assert_eq!(first.len(), 1);
        write("a=c:1\nb=c:2");
        assert_eq!(watched.look(), None, "it may be half written");
        write("a=c:1\nb=c:22\n");
        assert_eq!(watched.look(), None);
        let entries = watched.look().unwrap();
        assert_eq!(entries[1].address.as_str(), "c:22");
        for text in ["", "a=c:1\nb"] {
            write(text);
            assert_eq!((watched.look(), watched.look()), (None, None), "{text:?} changes nothing");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(watched.look(), None);
    }

    #[test]
    fn an_address_leaves_after_it_was_missing_three_times() {
        let mut resolved = Resolved::new("kv:9000".parse().unwrap());
        let [a, b] = ["10.0.0.1:9000", "[::1]:9000"].map(|text| text.parse().unwrap());
        let mut hear = |found: &[SocketAddr]| {
            let entries = resolved.hear(found);
            entries.iter().map(|entry| entry.name.to_string()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(hear(&[a, b, a]), "10.0.0.1-9000 v6---1-9000");
        assert_eq!(hear(&[b]), "10.0.0.1-9000 v6---1-9000");
        assert_eq!(hear(&[b]), "10.0.0.1-9000 v6---1-9000");
        assert_eq!(hear(&[a, b]), "10.0.0.1-9000 v6---1-9000", "it is back");
        assert_eq!((hear(&[b]), hear(&[b])).1, "10.0.0.1-9000 v6---1-9000");
        assert_eq!(hear(&[b]), "v6---1-9000");
    }

    #[tokio::test]
    async fn a_name_that_does_not_resolve_changes_nothing() {
        let mut resolved = Resolved::new("nobody.invalid:9000".parse().unwrap());
        assert_eq!(resolved.look().await, None);
        assert!(resolved.said.is_some(), "and it was said");
        let mut local = Resolved::new("localhost:9000".parse().unwrap());
        assert!(!local.look().await.unwrap().is_empty());
    }
}
