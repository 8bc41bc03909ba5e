//! Where each peer is found: where the log says, or else where this node's own list of peers says.
//!
//! The log's word comes first, since it is the newest that the cluster agreed on. But nodes may all have moved while they
//! were down, and then nobody could reach a quorum to say so in the log; the list that each was started with gets them
//! there. A wrong address does no harm: each call names the node that it means.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::raft::config::FirstStart;

/// Where each peer is found.
#[derive(Debug, Default)]
pub(crate) struct Book(Mutex<BTreeMap<u64, Page>>);

#[derive(Debug, Default)]
struct Page {
    logged: Option<String>,
    listed: Option<String>,
    /// The logged address has failed more recently.
    by_list: bool,
}

impl Book {
    /// Begins with the list that the node was started with, if there is one: ids are places in it, from one.
    pub(crate) fn new(first: &FirstStart) -> Self {
        let FirstStart::Together(list) = first else {
            return Self::default();
        };
        let page = |peer: &String| Page { listed: Some(peer.clone()), ..Page::default() };
        Self(Mutex::new((1..).zip(list.iter().map(|member| page(&member.peer))).collect()))
    }

    /// Notes where the log says that the members are.
    pub(crate) fn learn<'a>(&self, members: impl Iterator<Item = (u64, &'a str)>) {
        let mut pages = self.pages();
        for (id, peer) in members {
            let page = pages.entry(id).or_default();
            if page.logged.as_deref() != Some(peer) {
                page.logged = Some(peer.to_owned());
                page.by_list = false;
            }
        }
    }

    /// Gives the address to try now; `given` if nothing is known.
    pub(crate) fn address(&self, id: u64, given: &str) -> String {
        self.pages().get(&id).and_then(Page::current).unwrap_or(given).to_owned()
    }

    /// Notes that an address was of no use: the other one is tried next, if there is another.
    pub(crate) fn failed(&self, id: u64, address: &str) {
        if let Some(page) = self.pages().get_mut(&id)
            && page.current() == Some(address)
        {
            page.by_list = !page.by_list;
        }
    }

    fn pages(&self) -> MutexGuard<'_, BTreeMap<u64, Page>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Page {
    fn current(&self) -> Option<&str> {
        let (first, second) = match self.by_list {
            false => (&self.logged, &self.listed),
            true => (&self.listed, &self.logged),
        };
        first.as_deref().or(second.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::types::Member;

    #[test]
    fn the_list_is_tried_where_the_log_fails_and_the_other_way_round() {
        let member = |peer: &str| Member { client: String::new(), peer: peer.to_owned() };
        let book = Book::new(&FirstStart::Together(vec![member("new-1"), member("new-2")]));
        assert_eq!(book.address(2, "given"), "new-2");
        assert_eq!(book.address(3, "given"), "given");
        book.learn([(2, "old-2"), (3, "old-3")].into_iter());
        assert_eq!(book.address(2, "given"), "old-2");
        book.failed(2, "old-2");
        // Several calls that fail at once count once.
        book.failed(2, "old-2");
        assert_eq!(book.address(2, "given"), "new-2");
        book.failed(2, "new-2");
        assert_eq!(book.address(2, "given"), "old-2");
        book.failed(3, "old-3");
        assert_eq!(book.address(3, "given"), "old-3");
    }
}
