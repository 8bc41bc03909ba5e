//! Keeps writes of former owners out of a storage: who owned which keys last, by token, on the storage's side.
//!
//! A lease ends what a task *believes*. It cannot end a write that left the task while it owned the key and sits in a queue,
//! a retry or a network since; no clock bounds how long. So each write carries the token of its owner, and the storage
//! refuses what is older than the owner it knows. `docs/fencing.md` says what that protects from, and does the same in SQL.
//!
//! A new owner calls [`Fence::advance`] before its first read, and not with its first write: between the two, a delayed
//! write of the owner before would still be let in, and be overwritten by what the new owner makes of its stale read.
//!
//! ```
//! use mandoline::fence::{Fence, Token};
//! use mandoline::{Slice, SliceKey};
//!
//! let mut fence = Fence::new();
//! let (old, new): (Token, Token) = ("1.41".parse()?, "1.42".parse()?);
//! let key = SliceKey::of(b"user-42");
//! fence.advance(Slice::FULL, old)?;
//! fence.check(key, old)?; // the owner writes
//!
//! fence.advance(Slice::FULL, new)?; // another task owns the slice now, and will read
//! assert!(fence.check(key, old).is_err(), "a write that was on its way comes too late");
//! fence.check(key, new)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use mandoline_core::generation::Generation;
use mandoline_core::key::SliceKey;
use mandoline_core::slice::Slice;
use mandoline_core::slice_map::SliceMap;

/// What an owner shows to the storage: the generation at which it got the slice. For each key, a later owner's is greater.
pub type Token = Generation;

/// The newest token of every key of one job, by ranges.
///
/// `check` takes `&self` and `advance`, which is rare, `&mut self`: share it as `Arc<RwLock<Fence>>`, and hold the read lock
/// from the check *until the write is done*. A check that lets go before is a check of nothing, for the new owner's
/// `advance` and its read may come in between.
///
/// It must not forget while the data lasts. One that is kept beside data on disk belongs on that disk too:
/// [`tokens`](Self::tokens) gives what to write, and `advance` takes it in again.
///
/// Ranges with one token are joined. Exclusive slices merge only where their tokens agree, so once all owners have
/// advanced there is at most one range for each slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    // Invariant: two ranges side by side have different tokens.
    tokens: SliceMap<Token>,
}

/// A token that is older than another owner's: the task that sent it does not own these keys any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "token {given} is stale for {range}, whose owner has token {known}: drop the write, and look up the owner anew"
)]
pub struct Stale {
    /// The keys that have a newer owner, or some of them.
    pub range: Slice,
    /// That owner's token.
    pub known: Token,
    /// The token that was given.
    pub given: Token,
}

impl Fence {
    /// Makes one that knows of no owner yet, and so lets every token in.
    pub fn new() -> Self {
        Self { tokens: SliceMap::uniform(Token::ZERO) }
    }

    /// Says that the owner with this token is about to read and write the keys of `range`: from now on, older ones are
    /// refused. To be called before the first read; calling it again does no harm.
    ///
    /// Changes nothing if any part of the range has a newer owner, and then says which part.
    pub fn advance(&mut self, range: Slice, token: Token) -> Result<(), Stale> {
        let newer = self.tokens.touching(range).find(|(_, known)| **known > token);
        if let Some((slice, known)) = newer {
            let range = slice.overlap(range).expect("it touches the range");
            return Err(Stale { range, known: *known, given: token });
        }
        self.tokens.set(self.joined(range, token), token);
        Ok(())
    }

    /// Lets a write of `key` in unless its token is older than the newest owner's.
    ///
    /// A newer one is let in and not learned from. It says who may write this key, and nothing about the rest of its owner's
    /// slice; raised key by key, the fence would grow with the keys and still not have been closed before the owner's
    /// first read. Refusing it would keep out nobody but the rightful owner, where a storage came back from a backup of
    /// before its `advance`.
    pub fn check(&self, key: SliceKey, token: Token) -> Result<(), Stale> {
        let (range, known) = self.tokens.get(key);
        if *known > token {
            return Err(Stale { range, known: *known, given: token });
        }
        Ok(())
    }

    /// Gives every range and its token, in order. Ranges of which no owner is known have [`Token::ZERO`].
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = (Slice, Token)> {
        self.tokens.iter().map(|(range, token)| (range, *token))
    }

    /// Widens `range` by the neighbours that have this token already.
    fn joined(&self, range: Slice, token: Token) -> Slice {
        let same = |key: Option<SliceKey>| {
            let (neighbour, known) = self.tokens.get(key?);
            (*known == token).then_some(neighbour)
        };
        let first = same(range.first().previous()).unwrap_or(range).first();
        let last = same(range.last().next()).unwrap_or(range).last();
        Slice::new(first, last).expect("it became no narrower")
    }
}

impl Default for Fence {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::prng::Prng;

    use super::*;

    fn slice(first: u64, last: u64) -> Slice {
        Slice::new(SliceKey(first), SliceKey(last)).unwrap()
    }

    fn token(number: u64) -> Token {
        Token { incarnation: 1, number }
    }

    /// Ranges as text, without those that nobody owned.
    fn known(fence: &Fence) -> String {
        let owned = fence.tokens().filter(|(_, token)| *token != Token::ZERO);
        let text = owned.map(|(s, token)| format!("{:x}..{:x} {token}", s.first().0, s.last().0));
        text.collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn a_delayed_write_is_refused_after_advance() {
        let mut fence = Fence::new();
        fence.advance(slice(0, 99), token(1)).unwrap();
        assert_eq!(fence.check(SliceKey(7), token(1)), Ok(()));
        fence.advance(slice(0, 99), token(2)).unwrap();
        let stale = Stale { range: slice(0, 99), known: token(2), given: token(1) };
        assert_eq!(fence.check(SliceKey(7), token(1)), Err(stale));
        assert_eq!(fence.check(SliceKey(7), token(2)), Ok(()));
        assert_eq!(
            stale.to_string(),
            "token 1.1 is stale for 0000000000000000..0000000000000063, whose owner has token 1.2: drop the write, and look \
             up the owner anew"
        );
    }

    #[test]
    fn without_advance_a_delayed_write_gets_through() {
        let mut fence = Fence::new();
        fence.advance(slice(0, 99), token(1)).unwrap();
        // The new owner only writes: its token is let in, and teaches nothing.
        assert_eq!(fence.check(SliceKey(7), token(2)), Ok(()));
        assert_eq!(fence.check(SliceKey(7), token(1)), Ok(()));
        assert_eq!(known(&fence), "0..63 1.1");
    }

    #[test]
    fn an_advance_that_is_stale_in_part_changes_nothing() {
        let mut fence = Fence::new();
        fence.advance(slice(50, 59), token(5)).unwrap();
        let before = fence.clone();
        let stale = Stale { range: slice(50, 54), known: token(5), given: token(4) };
        assert_eq!(fence.advance(slice(0, 54), token(4)), Err(stale));
        assert_eq!(fence, before);
        assert_eq!(fence.advance(slice(0, 49), token(4)), Ok(()));
        assert_eq!(fence.advance(slice(50, 59), token(5)), Ok(()), "twice is once");
    }

    #[test]
    fn ranges_split_and_merge() {
        let mut fence = Fence::new();
        fence.advance(slice(0, 99), token(1)).unwrap();
        fence.advance(slice(20, 39), token(2)).unwrap();
        assert_eq!(known(&fence), "0..13 1.1, 14..27 1.2, 28..63 1.1");
        assert!(fence.check(SliceKey(20), token(1)).is_err());
        assert!(fence.check(SliceKey(19), token(1)).is_ok());
        assert!(fence.check(SliceKey(40), token(1)).is_ok());
        fence.advance(slice(0, 19), token(3)).unwrap();
        fence.advance(slice(20, 39), token(3)).unwrap();
        assert_eq!(known(&fence), "0..27 1.3, 28..63 1.1");
        fence.advance(slice(40, 99), token(3)).unwrap();
        assert_eq!(known(&fence), "0..63 1.3");
    }

    #[test]
    fn both_ends_of_the_line_are_keys_like_others() {
        let mut fence = Fence::new();
        fence.advance(slice(u64::MAX, u64::MAX), token(2)).unwrap();
        fence.advance(slice(0, 0), token(2)).unwrap();
        assert_eq!(known(&fence), "0..0 1.2, ffffffffffffffff..ffffffffffffffff 1.2");
        fence.advance(Slice::FULL, token(2)).unwrap();
        assert_eq!(known(&fence), "0..ffffffffffffffff 1.2");
    }

    #[test]
    fn a_restored_cluster_is_newer_than_the_one_before() {
        let mut fence = Fence::new();
        fence.advance(Slice::FULL, token(u64::MAX)).unwrap();
        let restored = Token { incarnation: 2, number: 1 };
        fence.advance(slice(0, 99), restored).unwrap();
        assert!(fence.check(SliceKey(7), token(u64::MAX)).is_err(), "the old cluster still runs");
        assert!(fence.check(SliceKey(7), restored).is_ok());
    }

    #[test]
    fn what_is_written_down_comes_back() {
        let mut fence = Fence::new();
        fence.advance(slice(0, 99), token(1)).unwrap();
        fence.advance(slice(50, u64::MAX), token(2)).unwrap();
        let mut again = Fence::default();
        for (range, token) in fence.tokens() {
            again.advance(range, token).unwrap();
        }
        assert_eq!(again, fence);
    }

    #[test]
    fn ranges_say_what_keys_one_by_one_would() {
        const KEYS: u64 = 24;
        for seed in 0..200 {
            let mut prng = Prng::new(seed);
            let mut fence = Fence::new();
            let mut each = [Token::ZERO; KEYS as usize];
            for step in 0..100 {
                let (one, other) = (prng.below(KEYS), prng.below(KEYS));
                let (first, last) = (one.min(other), one.max(other));
                let token = token(prng.below(step / 4 + 2));
                let part = &mut each[first as usize..=last as usize];
                let newer = part.iter().any(|known| *known > token);
                assert_eq!(fence.advance(slice(first, last), token).is_err(), newer, "seed {seed}");
                if !newer {
                    part.fill(token);
                }
                for (key, known) in (0..).map(SliceKey).zip(each) {
                    assert_eq!(fence.check(key, token).is_err(), known > token, "seed {seed}");
                }
                let runs = each.chunk_by(|one, other| one == other).count();
                let rest = usize::from(each[KEYS as usize - 1] != Token::ZERO);
                assert_eq!(fence.tokens().len(), runs + rest, "seed {seed}: as few as can be");
            }
        }
    }
}
