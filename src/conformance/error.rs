//! [`ConformanceError`]: the first expectation that an adapter did not meet.

use std::{error::Error, fmt};

/// First expectation of a scenario that was not met.
///
/// `E` is the error of the [`Fixture`](crate::conformance::Fixture).
///
/// # Examples
///
/// ```
/// use std::io;
/// use tower_sentinel::conformance::ConformanceError;
///
/// let error = ConformanceError::<io::Error>::Violated {
///     scenario: "prefetch_holds",
///     expected: "no delivery".to_owned(),
///     found: "the job \"6\"".to_owned(),
/// };
/// assert_eq!(error.to_string(), "prefetch_holds: expected no delivery, found the job \"6\"");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConformanceError<E> {
    /// The adapter did something else than expected.
    Violated {
        /// Name of the scenario, which is that of its function.
        scenario: &'static str,
        /// Expected behaviour.
        expected: String,
        /// Observed behaviour.
        found: String,
    },
    /// The fixture failed, which says nothing about the adapter.
    Fixture {
        /// Name of the scenario, which is that of its function.
        scenario: &'static str,
        /// Error of the fixture.
        error: E,
    },
}

impl<E> ConformanceError<E> {
    /// Returns the name of the scenario.
    pub fn scenario(&self) -> &'static str {
        match self {
            ConformanceError::Violated { scenario, .. }
            | ConformanceError::Fixture { scenario, .. } => scenario,
        }
    }
}

impl<E> fmt::Display for ConformanceError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConformanceError::Violated {
                scenario,
                expected,
                found,
            } => write!(f, "{scenario}: expected {expected}, found {found}"),
            ConformanceError::Fixture { scenario, .. } => {
                write!(f, "{scenario}: the fixture of the test failed")
            }
        }
    }
}

impl<E: Error + 'static> Error for ConformanceError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConformanceError::Violated { .. } => None,
            ConformanceError::Fixture { error, .. } => Some(error),
        }
    }
}
