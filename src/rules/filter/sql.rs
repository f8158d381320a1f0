//! A typed expression as SQL that means the same wherever it is evaluated.

use super::node::{Node, Operand};
use super::typing::ColumnRef;
use crate::model::names::{quote_ident, quote_literal};

/// Columns quoted, text compared under "C", constants with their types, everything in parentheses.
pub(super) fn render(node: &Node<ColumnRef>) -> String {
    let joined =
        |parts: &[Node<ColumnRef>], by: &str| format!("({})", parts.iter().map(render).collect::<Vec<_>>().join(by));
    match node {
        Node::Known(Some(true)) => "true".to_owned(),
        Node::Known(Some(false)) => "false".to_owned(),
        Node::Known(None) => "null::boolean".to_owned(),
        Node::Flag(column) => quote_ident(&column.name),
        Node::Compare { left, operator, right } => format!("({} {} {})", side(left), operator.sql(), side(right)),
        Node::Distinct { left, right } => format!("({} IS DISTINCT FROM {})", side(left), side(right)),
        Node::In { column, list, null, .. } => {
            let null = null.then(|| "null".to_owned());
            let list: Vec<_> = list.iter().map(|(_, sql)| sql.clone()).chain(null).collect();
            format!("({} IN ({}))", collated(column), list.join(", "))
        }
        Node::Like { column, pattern } => {
            format!("({} LIKE {}::text)", collated(column), quote_literal(&pattern.text()))
        }
        Node::IsNull(column) => format!("({} IS NULL)", quote_ident(&column.name)),
        Node::Unknown(inner) => format!("({} IS UNKNOWN)", render(inner)),
        Node::Is(inner, true) => format!("({} IS TRUE)", render(inner)),
        Node::Is(inner, false) => format!("({} IS FALSE)", render(inner)),
        Node::Not(inner) => format!("(NOT {})", render(inner)),
        Node::And(parts) => joined(parts, " AND "),
        Node::Or(parts) => joined(parts, " OR "),
    }
}

fn side(operand: &Operand<ColumnRef>) -> String {
    match operand {
        Operand::Column(column, _) => collated(column),
        Operand::Constant(_, sql) => sql.clone(),
    }
}

fn collated(column: &ColumnRef) -> String {
    let name = quote_ident(&column.name);
    if column.collated { format!("{name} COLLATE \"C\"") } else { name }
}
