//! Leave to be one of so many at a time: of connections, of TLS handshakes, of tunnels.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Leave to be one of so many, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<AtomicUsize>);

impl Permit {
    /// Takes one, unless as many are taken.
    pub(crate) fn take(taken: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        // Given back at once where it is one too many.
        let permit = Self(Arc::clone(taken));
        (taken.fetch_add(1, Relaxed) < most).then_some(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_given_than_there_are_and_each_comes_back() {
        let taken = Arc::default();
        let permits = [(); 2].map(|()| Permit::take(&taken, 2));
        assert!(permits.iter().all(Option::is_some));
        assert!(Permit::take(&taken, 2).is_none());
        drop(permits);
        assert_eq!(taken.load(Relaxed), 0);
        assert!(Permit::take(&taken, 1).is_some());
    }
}
